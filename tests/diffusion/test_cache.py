"""Cached denoising: exact where nothing is stale, frozen where it should be, one program."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdsd_jax.denoiser import (
    DenoiserConfig,
    attention,
    hidden_states,
    init_base,
    init_lora,
    prepared,
    refresh_cache,
    window_states_at,
)
from gdsd_jax.diffusion import SamplerConfig, cache, sample, sampler
from gdsd_jax.hub import load_checkpoint
from gdsd_jax.runtime.errors import UserError

SAMPLERS = Path(__file__).parents[1] / "golden" / "samplers"
SLOW = pytest.mark.slow
CASES = json.loads((SAMPLERS / "llada_cases.json").read_text())
WITH_BLOCKS = [
    pytest.param(name, kind, marks=() if (name, kind) in (("b_blocks_uneven", "prefix"), ("e_cfg", "dual")) else SLOW)
    for name, case in CASES.items() if case["block_length"] < case["gen_length"]
    for kind in ("prefix", "dual")
]  # fmt: skip

TINY = DenoiserConfig(
    family="llada", vocab_size=23, hidden_size=16, num_layers=1, num_heads=4, num_kv_heads=2, intermediate_size=16,
    max_length=64, rope_theta=1e4, rms_norm_eps=1e-5, qkv_bias=True, tied_head=False, next_token_logits=False,
    mask_token_id=22, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
SHIFTED = dataclasses.replace(TINY, next_token_logits=True)
PROMPTS = jnp.arange(1, 16).reshape(3, 5)
PADDED = jnp.arange(5) >= jnp.array([[0], [2], [4]])


pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.cache
def random_base(config: DenoiserConfig) -> dict:
    base = jax.jit(init_base, static_argnums=0)(config, jax.random.key(0))
    return base | {"embedding": 50 * base["embedding"], "head": 50 * base["head"]}


def random_adapter(config: DenoiserConfig):
    lora = init_lora(config, jax.random.key(1), rank=2, alpha=4.0, targets=("q", "k", "v", "down"))
    return lora.replace(weights=jax.tree.map(lambda w: w + 0.1, lora.weights))


def settings(**changes) -> SamplerConfig:
    return SamplerConfig(
        **{"completion_length": 8, "steps": 8, "block_length": 4, "strategy": "low_confidence"} | changes
    )


def roll_out(run: SamplerConfig, config=TINY, lora=None, mask=PADDED, seed=2):
    return sample(config, random_base(config), lora, PROMPTS, mask, jax.random.key(seed), run)


def same(one, other) -> None:
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.commit_step, other.commit_step)
    np.testing.assert_allclose(one.confidence, other.confidence, atol=1e-5)


@pytest.mark.parametrize(("name", "kind"), WITH_BLOCKS)
def test_refreshed_at_every_step_follows_the_recorded_trace(golden, name, kind):
    case, trace = CASES[name], np.load(SAMPLERS / f"llada_{name}.npz")
    config, base = load_checkpoint(golden / "llada_tiny")
    config = dataclasses.replace(config, mask_token_id=case["mask_id"])
    run = SamplerConfig(
        completion_length=case["gen_length"], steps=case["steps"], block_length=case["block_length"],
        strategy=case["remasking"], forbid_mask=False, cache=kind, refresh_every=1,
        **{k: case[k] for k in ("cfg_scale",) if k in case},
    )  # fmt: skip
    mask = trace["attention_mask"].astype(bool) if case["attention_mask"] else None
    rollout = sample(config, base, None, trace["prompt"], mask, jax.random.key(0), run)
    for step, tokens in enumerate(trace["x_history"], start=-1):
        np.testing.assert_array_equal(sampler.replay(rollout, config, step), tokens, err_msg=f"after step {step}")


@SLOW
@pytest.mark.parametrize("unroll", [1, 3], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("config", [TINY, SHIFTED], ids=["aligned", "shifted"])
def test_a_window_over_its_own_cache_is_a_part_of_the_whole(config, unroll):
    config = dataclasses.replace(config, num_layers=3, layer_unroll=unroll)
    base, lora = random_base(config), random_adapter(config)
    tokens = jax.random.randint(jax.random.key(3), (3, 17), 0, 23)
    expected = jax.jit(hidden_states, static_argnums=0)(config, base, lora, tokens, prompt_mask=PADDED)
    at = jnp.array([7, 0, 16])
    hidden, kept = jax.jit(refresh_cache, static_argnums=0)(config, base, lora, tokens, at, prompt_mask=PADDED)
    np.testing.assert_allclose(hidden, expected[:, at], atol=1e-6)

    window = jax.jit(
        lambda tokens, start, frozen: window_states_at(
            config, base, lora, tokens, kept, start=start, size=6, frozen=frozen, prompt_mask=PADDED
        )(slice(0, 6))
    )
    for start, frozen in ((5, 5), (9, 12), (11, 11)):
        np.testing.assert_allclose(window(tokens, start, frozen), expected[:, start : start + 6], atol=1e-5)
    # Tokens outside the window are not read. Frozen tokens in it are queries, but the cache has their keys and values.
    first = 9 - config.next_token_logits
    outside = (jnp.arange(17) < first) | (jnp.arange(17) >= 15)
    other = jnp.where(outside, 3, tokens)
    np.testing.assert_array_equal(window(other, 9, 12), window(tokens, 9, 12))
    frozen = tokens.at[:, first:12].set(3)
    after = 3 + config.next_token_logits
    np.testing.assert_array_equal(window(frozen, 9, 12)[:, after:], window(tokens, 9, 12)[:, after:])
    active = tokens.at[:, 14].set((tokens[:, 14] + 1) % 23)
    assert (window(active, 9, 12) != window(tokens, 9, 12)).any(axis=-1)[:, after:].all()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "config"), [("none", TINY), ("dual", SHIFTED)])
def test_unrolled_layers_roll_out_as_the_scan_does(kind, config):
    # Unrolled, a rollout reads the head by columns, and the first layer's projections from a table of its 23 tokens.
    run = settings(cache=kind, temperature=1.0)
    scanned, unrolled = (dataclasses.replace(config, num_layers=2, layer_unroll=n) for n in (1, 2))
    lora = random_adapter(scanned)
    same(roll_out(run, scanned, lora), roll_out(run, unrolled, lora))


@pytest.mark.slow
@pytest.mark.parametrize(("config", "kind"), [(TINY, "dual"), (SHIFTED, "dual"), (TINY, "prefix")])
def test_layers_apart_over_one_cache_roll_out_as_the_scan_does(monkeypatch, config, kind):
    """On an NVIDIA GPU: each layer's matrices with the adapter beside them, and windows written into the cache."""
    monkeypatch.setattr(attention, "IMPLEMENTATION", "xla")
    run = settings(cache=kind, refresh_every=3, temperature=1.0)
    config = dataclasses.replace(config, num_layers=2)
    lora, fused = random_adapter(config), dataclasses.replace(config, attention="cudnn")
    base, adapter = prepared.repeated(fused, random_base(config), lora, 1, cached=True)
    assert len(base["layers"]) == len(adapter.weights["layers"]) == 2
    assert {name: own["joined"].shape[1] for name, own in adapter.weights["layers"][1].items()} == {
        "q": 18, "k": 18, "v": 18, "down": 18,
    }  # fmt: skip
    same(roll_out(run, fused, lora), roll_out(run, config, lora))
    monkeypatch.setattr(prepared, "SHARE", 1e-9)
    monkeypatch.setattr(prepared, "_memory", lambda: 1e9)
    stacked, _ = prepared.repeated(fused, random_base(config), lora, 1, cached=True)
    assert isinstance(stacked["layers"], dict)


@pytest.mark.parametrize("mask", [PADDED, pytest.param(None, marks=SLOW)], ids=["padded", "all real"])
@pytest.mark.parametrize("unroll", [pytest.param(1, marks=SLOW), 2], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("config", [TINY, SHIFTED], ids=["aligned", "shifted"])
def test_a_cache_around_the_window_lacks_only_what_is_never_read(config, unroll, mask):
    config = dataclasses.replace(config, num_layers=2, layer_unroll=unroll)
    base, lora = random_base(config), random_adapter(config)
    tokens = jax.random.randint(jax.random.key(3), (3, 17), 0, 23)
    later = tokens.at[:, 8:12].set(5)

    @functools.partial(jax.jit, static_argnames="cut")
    def window(start, cut):
        around, frozen = ((start, 6), None) if cut else (None, start)
        _, kept = refresh_cache(config, base, lora, tokens, jnp.arange(3), around=around, prompt_mask=mask)
        read = window_states_at(config, base, lora, later, kept, start=start, size=6, frozen=frozen, prompt_mask=mask)
        return read(jnp.array([5, 0, 3])), sum(x.size for x in jax.tree.leaves(kept))

    for start in (7, 9):
        (whole, size), (cut, smaller) = window(start, False), window(start, True)
        np.testing.assert_allclose(cut, whole, atol=1e-5)
        assert smaller * 17 == size * 11


@pytest.mark.parametrize(
    ("kind", "config", "changes"),
    [
        # Five blocks under four windows: the first one reaches back over a block that is done.
        pytest.param(
            "prefix", TINY, {"completion_length": 10, "block_length": 2, "steps": 5, "temperature": 1.0}, marks=SLOW
        ),
        pytest.param("dual", SHIFTED, {"strategy": "maskgit_plus", "alg_temp": 0.3}, marks=SLOW),
        ("dual", TINY, {"cfg_scale": 0.7, "threshold": 0.5, "refresh_every": 2, "stop_at_eos": True}),
        pytest.param("prefix", TINY, {"cfg_scale": 0.7, "steps": 7}, marks=SLOW),
        pytest.param("prefix", SHIFTED, {"strategy": "entropy", "temperature": 0.9, "top_p": 0.9}, marks=SLOW),
        pytest.param("prefix", SHIFTED, {"factor": 1.0, "completion_length": 10, "block_length": 2}, marks=SLOW),
        pytest.param("dual", SHIFTED, {"block_length": 8}, marks=SLOW),
    ],
)
def test_caches_are_exact_for_a_single_layer(kind, config, changes):
    """Keys and values of a first layer depend on their own token alone, and tokens outside the block do not change."""
    lora = random_adapter(config)
    exact = roll_out(settings(**changes | {"refresh_every": None}), config, lora)
    same(roll_out(settings(**changes, cache=kind), config, lora), exact)
    assert (exact.tokens != config.mask_token_id).all()
    assert len(np.unique(exact.commit_step)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dual", "prefix"])
def test_a_cache_of_several_layers_is_an_approximation_until_refreshed(kind):
    config = dataclasses.replace(TINY, num_layers=3)
    exact = roll_out(settings(), config)
    same(roll_out(settings(cache=kind, refresh_every=1), config), exact)
    cached = roll_out(settings(cache=kind), config)
    first = exact.commit_step == 0
    np.testing.assert_array_equal(cached.tokens[:, 5:][first], exact.tokens[:, 5:][first])
    assert (jnp.abs(cached.confidence - exact.confidence) > 1e-4).any()
    assert (cached.tokens != config.mask_token_id).all()


def test_windows_cover_the_rest_of_the_completion():
    assert cache.window_lengths(settings(cache="dual")) == (4,)
    assert cache.window_lengths(settings(completion_length=20, cache="prefix")) == (20, 12, 8, 4)
    long = settings(completion_length=256, block_length=32, cache="prefix")
    assert cache.window_lengths(long) == (256, 128, 64, 32)
    assert cache.window_lengths(settings(block_length=8, cache="prefix")) == (8,)


def test_one_program_for_all_keys_and_masks():
    run = settings(cache="prefix", temperature=1.0)
    before = sampler.compiled_sample._cache_size()
    rollouts = [roll_out(run, mask=mask, seed=seed) for mask, seed in ((PADDED, 0), (PADDED, 1), (PADDED[::-1], 0))]
    assert sampler.compiled_sample._cache_size() == before + 1
    assert (rollouts[0].tokens != rollouts[1].tokens).any()


def test_a_shifted_denoiser_needs_a_prompt():
    with pytest.raises(UserError, match="prompt"):
        sampler.check_fits(SHIFTED, 0, settings(cache="dual"))
    sampler.check_fits(TINY, 0, settings(cache="dual"))
