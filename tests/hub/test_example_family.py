"""The example of docs/new_family.md: one short file, by which a checkpoint is made, read, exported and sampled from."""

import dataclasses
import json
from pathlib import Path

import example_family
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from gdsd_jax import families, hub
from gdsd_jax.diffusion import SamplerConfig, sample
from gdsd_jax.hub import tiny
from gdsd_jax.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_the_guide_prints_the_example():
    example = (ROOT / "tests" / "example_family.py").read_text()
    assert f"```python\n{example}```" in (ROOT / "docs" / "new_family.md").read_text()
    assert len(example.splitlines()) < 120


@pytest.fixture
def family(monkeypatch, tmp_path):
    """Makes the family known, and a checkpoint of it in `base`."""
    (family,) = example_family.FAMILIES
    monkeypatch.setitem(families.FAMILIES, family.name, family)
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 24}
    tiny.build(tmp_path / "base", family=family.name, **sizes)
    return family


def test_one_file_makes_a_family(family, tmp_path):
    config, base = hub.load_checkpoint(tmp_path / "base")
    assert (config.family, config.block_size, config.qkv_bias) == ("example", 4, True)
    hub.export_checkpoint(tmp_path / "again", config, base, source=tmp_path / "base")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("base", "again")]
    assert files[0] == files[1]
    stored = load_file(tmp_path / "base" / "model.safetensors")
    np.testing.assert_array_equal(base["layers"]["down"]["weight"][1], stored["h.1.mlp.w2.weight"])
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"activation": "gelu"}))
    with pytest.raises(UserError, match="activation"):
        hub.load_checkpoint(tmp_path / "base")


def test_a_table_that_is_not_of_the_denoiser_is_refused():
    """A name from another version, one too many, and one too few."""
    (family,) = example_family.FAMILIES
    query = next(row for row in family.rows if row.path == ("layers", "q", "weight"))
    others = [row for row in family.rows if row is not query]
    with pytest.raises(ValueError, match=r"'example': no parameter .* layers/q/kernel; did you mean layers/q/weight\?"):
        dataclasses.replace(family, rows=(*others, query._replace(path=("layers", "q", "kernel"))))
    with pytest.raises(ValueError, match="no parameter .* pooler"):
        dataclasses.replace(family, rows=(*family.rows, query._replace(path=("pooler",))))
    with pytest.raises(ValueError, match=r"'example': the name table lacks layers/q/weight$"):
        dataclasses.replace(family, rows=tuple(others))


@pytest.mark.slow
def test_its_sampler_is_that_of_its_authors(family, tmp_path):
    config, base = hub.load_checkpoint(tmp_path / "base")
    settings = SamplerConfig(8, 8, **family.sampler)
    rollout = sample(config, base, None, np.full((1, 3), 9, np.int32), None, jax.random.key(0), settings)
    assert (rollout.tokens != config.mask_token_id).all()
