"""Config files that Python reads: one that makes no config is refused, and named."""

import os

import jax
import pytest

from gdsd_jax.config import read_config
from gdsd_jax.config.flags import enable_compilation_cache
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


def test_a_user_without_a_home_has_no_cache_of_programs(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir is None
        monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
        enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == "/somewhere/gdsd_jax"
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
