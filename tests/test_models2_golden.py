"""The smaller families against their authors' own code: logits, and the samplers token for token.

The recorded numbers are in the directory `GDSD_GOLDEN_MODELS2`, by default the copy beside this file; its README
describes their format.
"""

import dataclasses
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdsd_jax import hub
from gdsd_jax.denoiser import denoise, layout, logits_from_hidden, noisy_states_at
from gdsd_jax.denoiser.forward import rope_of, run
from gdsd_jax.denoiser.model import Context
from gdsd_jax.diffusion import SamplerConfig, blocks, sample
from gdsd_jax.diffusion.sampler import infill, replay
from gdsd_jax.training.rollout import completion_mask

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
    return dict(np.load(GOLDEN / name / f"{file}.npz"))


def having(file):
    """Returns the checkpoints for which the folder has this file."""
    return [name for name in MODELS if (GOLDEN / name / f"{file}.npz").is_file()]


@pytest.mark.parametrize("name", MODELS)
def test_logits(name):
    config, base = load(name)
    tokens = arrays(name, "inputs_nopad")["input_ids"]
    found = compute(raw(config), base, None, tokens)
    np.testing.assert_allclose(found, arrays(name, "logits_nopad")["logits"], atol=TOLERANCE)


@pytest.mark.parametrize(
    ("side", "name"), [(side, name) for side in ("leftpad", "rightpad") for name in having(f"inputs_{side}")]
)
def test_logits_of_padded_rows(side, name):
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


@pytest.mark.parametrize("name", having("logits_blockcausal"))
def test_logits_under_block_causal_attention(name):
    config, base = load(name)
    tokens = arrays(name, "inputs_nopad")["input_ids"]
    for key, logits in arrays(name, "logits_blockcausal").items():
        found = compute(raw(config, block_size=int(key.removeprefix("logits_block"))), base, None, tokens)
        np.testing.assert_allclose(found, logits, atol=TOLERANCE, err_msg=key)


@pytest.mark.parametrize("name", having("inputs_train_blockdiff"))
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


# --- samplers


def cases(sampler):
    path = GOLDEN / "samplers" / f"{sampler}_cases.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def every(sampler):
    """Returns the names of a sampler's cases; only the first is for the fast tests."""
    first, *others = cases(sampler) or [None]
    return [first, *(pytest.param(name, marks=pytest.mark.slow) for name in others)] if first else []


def case_of(sampler, name):
    """Returns a case's settings and arrays, and its checkpoint with the case's ids."""
    case = cases(sampler)[name]
    config, base = load(case.get("checkpoint", "a2d_qwen3_tiny"))
    ids = case.get("ids", {}) | {kind: case[f"{kind}_id"] for kind in ("mask", "stop", "pad") if case.get(f"{kind}_id")}
    if case.get("stop_ids"):
        (ids["stop"],) = case["stop_ids"]
    names = {"mask": "mask_token_id", "eos": "eos_token_id", "stop": "eos_token_id", "pad": "pad_token_id"}
    changes = {names[kind]: value for kind, value in ids.items() if kind in names}
    return case, dict(np.load(GOLDEN / "samplers" / case["file"])), dataclasses.replace(config, **changes), base


def left_padded(case, prompt, pad):
    """Returns prompts moved to the right, and their mask."""
    lengths = case.get("prompt_lens", [prompt.shape[1]] * len(prompt))
    tokens, mask = np.full(prompt.shape, pad, np.int32), np.zeros(prompt.shape, bool)
    for row, length in enumerate(lengths):
        tokens[row, prompt.shape[1] - length :] = prompt[row, :length]
        mask[row, prompt.shape[1] - length :] = True
    return tokens, mask


def completions(rollout, config):
    """Returns the completions before the first step and after each that wrote something, `[entries, B, L]`."""
    length = rollout.commit_step.shape[1]
    written = np.asarray(rollout.confidence) > -np.inf
    steps = [-1, *np.unique(np.asarray(rollout.commit_step)[written])]
    return np.stack([np.asarray(replay(rollout, config, int(step)))[:, -length:] for step in steps])


def distinct(states):
    """Returns the states without those that equal the one before them."""
    return np.stack([state for n, state in enumerate(states) if n == 0 or (state != states[n - 1]).any()])


def same_steps(found, wanted, mask):
    """Asserts that every state is the reference's; what that has not appended yet (-1) is still masked here."""
    np.testing.assert_array_equal(distinct(found), distinct(np.where(wanted == -1, mask, wanted)))


def dllm_settings(case, **changes):
    if "steps_per_block" in case:
        changes["steps"] = case["steps_per_block"] * -(-case["max_new_tokens"] // case["block_size"])
    fields = {
        "steps": case["steps"],
        "block_length": case["block_size"],
        "strategy": "mdlm" if case["scheduler"] == "linear" else "mdlm_cosine",
        "cfg_scale": case.get("cfg_scale", 0.0),
        "suppress": case.get("suppress_tokens", ()),
        "suppress_confidence": case.get("begin_suppress_tokens", ()),
        "forbid_mask": False,
    }
    return SamplerConfig(**(fields | changes))


@pytest.mark.parametrize("name", every("mdlm"))
def test_mdlm_sampler(name):
    case, data, config, base = case_of("mdlm", name)
    config = dataclasses.replace(config, next_token_logits=case.get("right_shift_logits", False))
    prompt, lengths = data["prompt"], case["prompt_lens"]
    if "max_new_tokens" not in case:
        real = np.arange(prompt.shape[1]) < np.array(lengths)[:, None]
        start = data["x_history"][0]
        settings = dllm_settings(case, completion_length=prompt.shape[1])
        rollout = infill(config, base, None, start, real, jax.random.key(0), settings)
        same_steps(completions(rollout, config), data["x_history"], config.mask_token_id)
        return
    new = case["max_new_tokens"]
    tokens, mask = left_padded(case, prompt, config.pad_token_id)
    rollout = sample(config, base, None, tokens, mask, jax.random.key(0), dllm_settings(case, completion_length=new))
    wanted = np.stack([data["x_history"][:, row, n : n + new] for row, n in enumerate(lengths)], axis=1)
    same_steps(completions(rollout, config), wanted, config.mask_token_id)


@pytest.mark.parametrize("name", every("bd3lm"))
def test_bd3lm_sampler(name):
    case, data, config, base = case_of("bd3lm", name)
    shift = case.get("right_shift_logits", False)
    config = dataclasses.replace(config, next_token_logits=shift, block_size=case["block_size"])
    tokens, mask = left_padded(case, data["prompt"], config.pad_token_id)
    length = data["x_history"].shape[2] - -(-tokens.shape[1] // case["block_size"]) * case["block_size"]
    settings = dllm_settings(
        case,
        completion_length=case["max_new_tokens"],
        stop_at_eos=True,
        hide_pads=True,
    )
    rollout = sample(config, base, None, tokens, mask, jax.random.key(0), settings)
    found, wanted = completions(rollout, config), data["x_history"][:, :, -length:]
    assert (found[..., length:] == config.mask_token_id).all()
    same_steps(found[..., :length], wanted, config.mask_token_id)


@pytest.mark.parametrize("name", every("sdar"))
def test_sdar_sampler(name):
    case, data, config, base = case_of("sdar", name)
    block, prompt, wanted = case["block_length"], data["prompt"], data["x_history"][:, :, data["prompt"].shape[1] :]
    kind = case.get("remasking", case.get("remasking_strategy"))
    length = -(-wanted.shape[2] // block) * block
    threshold = case.get("threshold", case.get("confidence_threshold"))
    if kind == "sequential" or threshold == 1.0:
        threshold = None
    if case["impl_key"] == "generate" and threshold is not None:
        threshold = 0.0  # that code takes its confidence after top_k = 1, where every token has probability 1
    settings = SamplerConfig(
        completion_length=length,
        steps=case["denoising_steps"] * (length // block),
        block_length=block,
        strategy="sequential" if kind == "sequential" else "low_confidence",
        threshold=threshold,
        floor=threshold is not None,
        stop_at_eos="stop_ids" in case,
    )
    config = dataclasses.replace(config, block_size=block)
    rollout = sample(config, base, None, prompt, None, jax.random.key(0), settings)
    same_steps(completions(rollout, config)[..., : wanted.shape[2]], wanted, config.mask_token_id)


@pytest.mark.parametrize("name", every("illada"))
def test_illada_sampler(name):
    case, data, config, base = case_of("illada", name)
    grow = case["impl_key"] == "var"
    blocks = case["gen_length"] // case["block_length"]
    settings = SamplerConfig(
        completion_length=case["gen_length"],
        steps=case["steps"] * blocks if grow else case["steps"],
        block_length=case["block_length"],
        strategy="low_confidence",
        grow=grow,
        stop_at_eos=case["stop_id"] is not None,
        forbid_mask=False,
        end_think=case.get("end_think_token_ids", ()),
        end_think_boost=case.get("end_think_logit_boost", 0.0),
        end_think_power=case.get("end_think_boost_power", 2.0),
    )
    mask = data["attention_mask"].astype(bool) if case["attention_mask"] else None
    rollout = sample(config, base, None, data["prompt"], mask, jax.random.key(0), settings)
    found, wanted = completions(rollout, config), data["x_history"][:, :, data["prompt"].shape[1] :]
    assert (found[..., wanted.shape[2] :] == config.mask_token_id).all()
    same_steps(found[..., : wanted.shape[2]], wanted, config.mask_token_id)


THEIR_MASK = 32  # Fast-dLLM v2 takes its attention mask with blocks of this size, whichever size it writes


def with_a_second_block_size(monkeypatch, second):
    """Makes the sampler of blocks attend as that code does where the size of its blocks does not divide its mask's.

    A token then sees nothing behind its block of the mask either. Passes over the whole text take the place of cached
    ones here, so the text itself is the cache.
    """

    class Layout(layout.Layout):
        def attends(self, query, key):
            return super().attends(query, key) & (key // second <= query // second)

    def whole(config, base, lora, text):
        seen = Layout(config.block_size, text.shape[1])
        return run(config, base, lora, text, Context(None, rope_of(config, text.shape[1], seen)), layout=seen)

    def prefilled(config, base, lora, tokens, real, width, rope):
        last = whole(config, base, lora, tokens)(slice(tokens.shape[1] - 1, tokens.shape[1]))[0]
        return jnp.pad(tokens, ((0, 0), (0, width - tokens.shape[1]))), last[:, 0]

    def block_states(config, base, lora, tokens, text, seen, rope, real, start):
        last = whole(config, base, lora, blocks.stored(config, text, tokens, start))
        places = lambda at: (jnp.arange(at.start, at.stop) if isinstance(at, slice) else at) + start  # noqa: E731
        return lambda at: (last(places(at))[0], tokens)

    def stored(config, text, tokens, start):
        return jax.lax.dynamic_update_slice_in_dim(text, tokens, start, axis=1)

    for function in (prefilled, block_states, stored):
        monkeypatch.setattr(blocks, function.__name__, function)


@pytest.mark.parametrize("name", every("fast"))
def test_fast_dllm_sampler(monkeypatch, name):
    """Row by row, as ours writes the first blocks of all rows together and that code by their positions."""
    case, data, config, base = case_of("fast", name)
    block, part = case["block_size"], case["small_block_size"]
    if THEIR_MASK % block:
        with_a_second_block_size(monkeypatch, THEIR_MASK)
    config = dataclasses.replace(config, block_size=block)
    tokens, mask = left_padded(case, data["prompt"], config.pad_token_id)
    length = -(-(data["x_history"].shape[2] - min(case["prompt_lens"])) // part) * part
    settings = SamplerConfig(
        completion_length=length,
        steps=length,
        block_length=part,
        strategy="low_confidence",
        threshold=case["threshold"] if case["threshold"] < 1 else 2.0,
        lead=True,
        cache="dual" if case.get("use_block_cache") else "none",
    )
    rollout = sample(config, base, None, tokens, mask, jax.random.key(0), settings)
    found = completions(rollout, config)
    for row, start in enumerate(case["prompt_lens"]):
        wanted = data["x_history"][:, row, start:]
        ours, theirs = (distinct(np.where(np.isin(x, (-1, case["pad_id"])), case["mask_id"], x))
                        for x in (found[:, row, : wanted.shape[1]], wanted))  # fmt: skip
        # A row that has ended loses the tokens after its end.
        gone = np.flatnonzero(((theirs[1:] == case["mask_id"]) & (theirs[:-1] != case["mask_id"])).any(axis=1))
        theirs = theirs[: gone[0] + 1] if len(gone) else theirs
        # Where the prompt fills its blocks, that code appends the first token before it looks at the text.
        ours = ours[int((theirs[0] != case["mask_id"]).any()) :]
        np.testing.assert_array_equal(ours[: len(theirs)], theirs)
        # What readers of a rollout see: nothing behind the end, which that code writes as pads.
        ours = np.asarray(rollout.tokens)[row : row + 1, -length:]
        ours = np.where(completion_mask(ours, config.ends) > 0, ours, case["pad_id"])[0]
        end = data["x_final"][row, start : case["final_lengths"][row]]
        np.testing.assert_array_equal(ours[: len(end)], end)
