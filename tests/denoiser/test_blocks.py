"""Block diffusion: one pass over a clean and a noisy copy; blocks written behind the exact cache of finished ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdsd_jax.denoiser import DenoiserConfig, hidden_states, init_base, init_lora
from gdsd_jax.denoiser.blocks import noisy_states_at

CONFIG = DenoiserConfig(
    family="sdar", vocab_size=40, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48,
    max_length=96, rope_theta=1e4, rms_norm_eps=1e-6, qkv_bias=False, tied_head=False, next_token_logits=False,
    mask_token_id=39, eos_token_id=38, pad_token_id=37, head_size=12, qk_norm=True, block_size=4, layer_unroll=2,
)  # fmt: skip
PROMPT, LENGTH = 7, 8
REAL = np.arange(PROMPT) >= np.array([[0], [2], [5]])


def policy(config):
    base = init_base(config, jax.random.key(0))
    lora = init_lora(config, jax.random.key(1), rank=2, alpha=8.0, targets=("q", "v", "down"))
    return base, jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape) / 4, lora)


def texts(rows=3):
    key_tokens, key_masked = jax.random.split(jax.random.key(5))
    tokens = jax.random.randint(key_tokens, (rows, PROMPT + LENGTH), 0, 37)
    masked = (jax.random.uniform(key_masked, tokens.shape) < 0.5) & (jnp.arange(PROMPT + LENGTH) >= PROMPT)
    return tokens, jnp.where(masked, CONFIG.mask_token_id, tokens)


states_of = jax.jit(hidden_states, static_argnums=0)


def separate_passes(config, base, lora, row, noisy, pads):
    """Returns the states of one row's noisy completion, each block from a pass of its own behind the clean text."""
    size, width = config.block_size, 20
    # The column of the row's first real token, and where its first token lies then.
    first = pads + -PROMPT % size if config.block_origin == "column" else 0
    start = first - pads
    text, noised = np.full((2, width), config.pad_token_id, np.int32)
    end = start + PROMPT + LENGTH
    text[first:end], noised[first:end] = np.asarray(row)[pads:], np.asarray(noisy)[pads:]
    real = (np.arange(width) >= first) & (np.arange(width) < end)
    blocks = np.arange(width) // size
    mixed = np.stack([np.where(blocks == block, noised, text) for block in range(width // size)])
    mask = jnp.broadcast_to(jnp.asarray(real), mixed.shape)
    states = states_of(config, base, lora, jnp.asarray(mixed), prompt_mask=mask)
    return np.asarray(states)[blocks, np.arange(width)][end - LENGTH : end]


# The fast tier holds this kind of pass against the families' recorded logits.
PASSES = ("sequence", True), ("sequence", False), ("column", False), ("column", True)


@pytest.mark.slow
@pytest.mark.parametrize(("origin", "shifted"), PASSES)
def test_one_pass_over_two_copies_equals_a_pass_for_each_block(origin, shifted):
    config = dataclasses.replace(CONFIG, block_origin=origin, next_token_logits=shifted)
    base, lora = policy(config)
    tokens, noisy = texts()

    @functools.partial(jax.jit, static_argnums=0)
    def together(masked, tokens, noisy):
        mask = jnp.asarray(REAL) if masked else None
        read = noisy_states_at(config, base, lora, tokens, noisy, length=LENGTH, prompt_mask=mask)
        return read(slice(PROMPT, PROMPT + LENGTH))

    found, unpadded = together(True, tokens, noisy), together(False, tokens, noisy)
    for row, pads in enumerate((~REAL).sum(axis=1)):
        expected = separate_passes(config, base, lora, tokens[row], noisy[row], pads)
        np.testing.assert_allclose(found[row], expected, atol=1e-5)
    expected = separate_passes(config, base, lora, tokens[1], noisy[1], 0)
    np.testing.assert_allclose(unpadded[1], expected, atol=1e-5)
