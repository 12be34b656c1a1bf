"""Numbers of the authors' own code for the smaller families: logits, and samplers token for token.

The folder is `GDSD_GOLDEN_MODELS2`, by default the copy beside this file; its README describes the form.
"""

import dataclasses
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from gdsd_jax import hub
from gdsd_jax.denoiser import denoise, logits_from_hidden, noisy_states_at

GOLDEN = Path(os.environ.get("GDSD_GOLDEN_MODELS2", Path(__file__).parent / "golden" / "models2"))
TOLERANCE = 1e-4
MODELS = sorted(path.parent.name for path in GOLDEN.glob("*/config.json") if "moe" not in path.parent.name)
CHECKS = {name: json.loads((GOLDEN / name / "checks.json").read_text()) for name in MODELS}
compute = jax.jit(denoise, static_argnums=0)


def load(name):
    """Returns a checkpoint of the folder; its ids are beside it, as tiny checkpoints have no tokenizer."""
    checks = CHECKS[name]
    ids = checks.get("ids", {}) | {key: checks[key] for key in ("mask", "eos") if key in checks}
    overrides = {f"{key}_token_id": value for key, value in ids.items() if key in ("mask", "eos", "pad")}
    return hub.load_checkpoint(GOLDEN / name, overrides=overrides)


def raw(config, **changes):
    """Returns the configuration without the shift and with the attention that a fixture asks for."""
    return dataclasses.replace(config, **({"next_token_logits": False, "block_size": None} | changes))


def arrays(name, file):
    path = GOLDEN / name / f"{file}.npz"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return dict(np.load(path))


@pytest.mark.parametrize("name", MODELS)
def test_logits(name):
    config, base = load(name)
    tokens = arrays(name, "inputs_nopad")["input_ids"]
    found = compute(raw(config), base, None, tokens)
    np.testing.assert_allclose(found, arrays(name, "logits_nopad")["logits"], atol=TOLERANCE)


@pytest.mark.parametrize("side", ["leftpad", "rightpad"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_padded_rows(name, side):
    config, base = load(name)
    inputs, wanted = arrays(name, f"inputs_{side}"), arrays(name, f"logits_{side}")
    real = inputs["attention_mask"].astype(bool)
    for key, logits in wanted.items():
        if key.endswith("CAUSAL"):  # an accident of that code, see the README
            continue
        # Both conventions count blocks in columns, the pads included.
        blocks = {"block_size": CHECKS[name].get("train_block_size"), "block_origin": "column"}
        blocks = blocks if "blockcausal" in key or "bd3lm" in key else {}
        mask = None if "without" in key else real
        found = compute(raw(config, **blocks), base, None, inputs["input_ids"], prompt_mask=mask)
        np.testing.assert_allclose(found[real], logits[real], atol=TOLERANCE, err_msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_logits_under_block_causal_attention(name):
    config, base = load(name)
    tokens = arrays(name, "inputs_nopad")["input_ids"]
    for key, logits in arrays(name, "logits_blockcausal").items():
        found = compute(raw(config, block_size=int(key.removeprefix("logits_block"))), base, None, tokens)
        np.testing.assert_allclose(found, logits, atol=TOLERANCE, err_msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_noisy_copy_behind_a_clean_one(name):
    config, base = load(name)
    inputs, wanted = arrays(name, "inputs_train_blockdiff"), arrays(name, "logits_train_blockdiff")
    model = raw(config, block_size=CHECKS[name]["train_block_size"])

    @jax.jit
    def noisy(base, clean, noisy):
        read = noisy_states_at(model, base, None, clean, noisy, length=clean.shape[1])
        return logits_from_hidden(model, base, read(None))

    found = noisy(base, inputs["x0"], inputs["xt"])
    np.testing.assert_allclose(found, wanted["logits_noisy_half"], atol=TOLERANCE)
    np.testing.assert_allclose(compute(model, base, None, inputs["x0"]), wanted["logits_clean_half"], atol=TOLERANCE)
