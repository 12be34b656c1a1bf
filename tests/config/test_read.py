"""Config files that Python reads: one that makes no config is refused, and named."""

import pytest

from gdsd_jax.config import read_config
from gdsd_jax.runtime.errors import UserError


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("config = {}", "has no function get_config"),
        ("def get_config():\n    return {'seed': 1}", "get_config returns a dict, not the ConfigDict"),
    ],
)
def test_a_file_that_makes_no_config_is_refused(tmp_path, monkeypatch, text, named):
    monkeypatch.setattr("sys.path", [])
    file = tmp_path / "own.py"
    file.write_text(text)
    with pytest.raises(UserError, match=f"own.py.*{named}"):
        read_config(file)
