"""Block diffusion: what the cached sampler writes is what passes without a cache would write."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdsd_jax.denoiser import DenoiserConfig, attention, denoise, init_base
from gdsd_jax.diffusion import SamplerConfig, sample
from gdsd_jax.diffusion.blocks import step_limit
from gdsd_jax.diffusion.sampler import replay
from gdsd_jax.methods import Batch
from gdsd_jax.methods.steps import sampled
from gdsd_jax.runtime.errors import UserError

CONFIG = DenoiserConfig(
    family="sdar", vocab_size=40, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48,
    max_length=96, rope_theta=1e4, rms_norm_eps=1e-6, qkv_bias=False, tied_head=False, next_token_logits=False,
    mask_token_id=39, eos_token_id=38, pad_token_id=37, head_size=12, qk_norm=True, block_size=4,
)  # fmt: skip
PROMPT, LENGTH = 7, 8
REAL = np.arange(PROMPT) >= np.array([[0], [2], [5]])
PROMPTS = np.asarray(jax.random.randint(jax.random.key(5), (3, PROMPT), 0, 37))
STATIC = SamplerConfig(LENGTH, LENGTH // 2, 4, "low_confidence", record=True)
FAST = SamplerConfig(LENGTH, LENGTH, 2, "low_confidence", record=True, threshold=0.2, lead=True)
uncached = jax.jit(denoise, static_argnums=0)


@functools.cache
def base():
    # Larger matrices, so that the distributions are far from even.
    return jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, init_base(CONFIG, jax.random.key(0)))


# The fast tier follows recorded traces of these samplers instead.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "shifted", "temperature"),
    [(STATIC, False, 0.0), (STATIC, False, 1.0), (FAST, True, 0.0), (FAST, True, 1.0)],
)
def test_every_commit_is_what_a_pass_without_a_cache_gives(settings, shifted, temperature):
    """Prompts of three lengths, whose tails share a block with their completions.

    At temperature 0 the tokens are the best of the uncached logits; at temperature 1 they were drawn with the
    probabilities of the uncached distribution. Either way confidence and entropy are those of that distribution.
    """
    config = dataclasses.replace(CONFIG, next_token_logits=shifted)
    settings = dataclasses.replace(settings, temperature=temperature)
    rollout = sample(config, base(), None, PROMPTS, REAL, jax.random.key(3), settings)
    steps, tokens = np.asarray(rollout.commit_step), np.asarray(rollout.tokens)[:, PROMPT:]
    assert (tokens != config.mask_token_id).all()
    # Tails of prompts take a block more, and its steps; methods count them too.
    batch = Batch(rollout.tokens, REAL, np.ones_like(steps), commit_step=rollout.commit_step, sampler=settings)
    assert steps.max() < step_limit(config, settings)
    assert settings.threshold or steps.max() >= settings.step_limit
    assert sampled(batch.replace(unwritten=step_limit(config, settings))).all()
    for step in np.unique(steps):
        before = replay(rollout, config, int(step) - 1)
        logits = uncached(config, base(), None, before, prompt_mask=jnp.asarray(REAL))[:, PROMPT:]
        logits = np.array(logits)
        logits[..., config.mask_token_id] = -np.inf
        now = steps == step
        best = logits.argmax(axis=-1)
        log_probs = np.asarray(jax.nn.log_softmax(logits))
        chosen = np.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
        if temperature == 0:
            np.testing.assert_array_equal(tokens[now], best[now])
        else:
            np.testing.assert_allclose(np.asarray(rollout.log_prob)[now], chosen[now], atol=1e-4)
        np.testing.assert_allclose(np.asarray(rollout.confidence)[now], np.exp(chosen)[now], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "shifted"), [(STATIC, False), (dataclasses.replace(FAST, cache="dual"), True)])
def test_the_call_for_cudnn_writes_the_same(monkeypatch, settings, shifted):
    """There a block is written into the cache that it attends to."""
    monkeypatch.setattr(attention, "IMPLEMENTATION", "xla")
    config = dataclasses.replace(CONFIG, next_token_logits=shifted)
    plain, fused = (
        sample(dataclasses.replace(config, attention=kind), base(), None, PROMPTS, REAL, jax.random.key(3), settings)
        for kind in ("plain", "cudnn")
    )
    np.testing.assert_array_equal(fused.tokens, plain.tokens)
    np.testing.assert_array_equal(fused.commit_step, plain.commit_step)
    np.testing.assert_allclose(fused.confidence, plain.confidence, atol=1e-5)


def test_rows_do_not_depend_on_their_neighbours():
    """A row alone, without its pads, writes what it writes beside rows with longer prompts, and in the same steps."""
    together = sample(CONFIG, base(), None, PROMPTS, REAL, jax.random.key(3), STATIC)
    alone = sample(CONFIG, base(), None, PROMPTS[1:2, 2:], None, jax.random.key(3), STATIC)
    np.testing.assert_array_equal(together.tokens[1, PROMPT:], alone.tokens[0, -LENGTH:])
    for number in range(len(PROMPTS)):
        own, numbers = slice(number, number + 1), np.array([number], np.int32)
        alone = sample(CONFIG, base(), None, PROMPTS[own], REAL[own], jax.random.key(3), STATIC, numbers)
        np.testing.assert_array_equal(together.tokens[own], alone.tokens)
        np.testing.assert_array_equal(together.commit_step[own], alone.commit_step)


@pytest.mark.slow
def test_stops_when_every_row_has_ended():
    """The ids that rows write in their second block end them; what was not written is the end."""
    free = np.asarray(sample(CONFIG, base(), None, PROMPTS[:1], None, jax.random.key(3), STATIC).tokens)[0, PROMPT:]
    config = dataclasses.replace(CONFIG, eos_token_id=int(free[0]))
    settings = dataclasses.replace(STATIC, stop_at_eos=True)
    rollout = sample(config, base(), None, PROMPTS[:1], None, jax.random.key(3), settings)
    # One token of the completion shares the first block with the prompt.
    assert (np.asarray(rollout.tokens)[0, PROMPT:] == free[0]).all()
    assert (np.asarray(rollout.commit_step)[0, 1:] == step_limit(config, settings)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_length": 8}, "block_length 8 does not divide the 4 tokens"),
        ({"cache": "prefix"}, "keeps an exact cache"),
        ({"end_think": (1, 2), "end_think_boost": 5.0}, "end_think is not supported"),
    ],
)
def test_settings_that_do_not_fit_blocks(changes, message):
    with pytest.raises(UserError, match=message):
        settings = dataclasses.replace(STATIC, **changes)
        sample(CONFIG, base(), None, PROMPTS, REAL, jax.random.key(0), settings)
