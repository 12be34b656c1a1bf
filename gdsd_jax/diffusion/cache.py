"""Approximate denoising: keys and values are kept while a block is decoded (Fast-dLLM, arXiv:2505.22618).

A refresh is a full pass. Until the next one only a window of the completion is computed: the active block ("dual"), or
everything from the active block on ("prefix"). Positions outside the window keep their keys, values and hidden states.

The prefix cache's window shrinks from block to block, but an array's length is fixed when a program is compiled. So
only a few lengths are used: the completion's, halved again and again down to one block. Each step takes the shortest
window that reaches back to the active block. A program for eight blocks holds four windows, not eight, and they compute
a fifth more tokens than windows of the exact length would. Where a window begins before the active block, the tokens
before the block stay frozen.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from gdsd_jax.denoiser import DenoiserConfig, LoRA, Read, attention, pick, refresh_cache, window_pass, window_states_at
from gdsd_jax.diffusion.remasking import SamplerConfig


def region(settings: SamplerConfig, block: Array) -> tuple[Array, int]:
    """Returns the first position, in the completion, and the number S of the positions that a step looks at.

    A step needs logits outside the active block only if masks may be left behind there.
    """
    if settings.forbid_mask and settings.blocks > 1:
        return block * settings.block_length, settings.block_length
    return jnp.zeros_like(block), settings.completion_length


def window_lengths(settings: SamplerConfig) -> tuple[int, ...]:
    """Returns the lengths of the windows of a program with these settings, the longest first."""
    if settings.cache == "dual":
        return (settings.block_length,)
    blocks = [settings.blocks]
    while blocks[-1] > 1:
        blocks.append(-(-blocks[-1] // 2))
    return tuple(count * settings.block_length for count in blocks)


def refresh(
    config: DenoiserConfig,
    base: dict,
    lora: LoRA | None,
    tokens: Array,
    prompt_mask: Array | None,
    block: Array,
    settings: SamplerConfig,
) -> tuple[Array, Any]:
    """Runs a full pass over `tokens` [B, T]; returns hidden states of the region [B, S, D], and keys and values.

    The keys and values are those of all tokens. With "dual", whose only window is the active block, those of the active
    block are left out.
    """
    first, size = region(settings, block)
    prompt_length = tokens.shape[1] - settings.completion_length
    window = prompt_length + block * settings.block_length, settings.block_length
    around = window if settings.cache == "dual" else None
    at = prompt_length + first + jnp.arange(size)
    return refresh_cache(config, base, lora, tokens, at, around=around, prompt_mask=prompt_mask)


def cached_states_at(
    config: DenoiserConfig,
    base: dict,
    lora: LoRA | None,
    hidden: Array,
    cache: Any,
    tokens: Array,
    prompt_mask: Array | None,
    block: Array,
    settings: SamplerConfig,
) -> tuple[Read, Any]:
    """Returns a function that gives the hidden states at places of the region, and the cache for the next step.

    Inside the window the states are computed from `tokens` [B, T]; outside it they are the refreshed `hidden`. The
    cache is the one that was given, except under cuDNN, where with "dual" the window's keys and values are in it.
    """
    length, active = settings.completion_length, block * settings.block_length
    prompt_length = tokens.shape[1] - length
    first, size = region(settings, block)

    def window(start: Array, width: int) -> Read:
        return window_states_at(
            config, base, lora, tokens, cache,
            start=prompt_length + start, size=width, prompt_mask=prompt_mask,
            frozen=None if settings.cache == "dual" else prompt_length + active,
        )  # fmt: skip

    if size == settings.block_length and settings.cache == "dual":
        if attention.chosen(config) == "cudnn":
            last = window_pass(
                config, base, lora, tokens, cache,
                start=prompt_length + active, size=size, prompt_mask=prompt_mask, keep=True,
            )  # fmt: skip
            found, cache = last(slice(0, size))
            return functools.partial(pick, found), cache
        return window(active, size), cache

    def states(width: int) -> Array:
        """Computes the region's states with a window of this width.

        The window is the active block ("dual"), or ends with the completion ("prefix").
        """
        start = active if settings.cache == "dual" else jnp.asarray(length - width, jnp.int32)
        read = window(start, width)
        if size == settings.block_length:
            return read(active - start + jnp.arange(size))
        return lax.dynamic_update_slice_in_dim(hidden, read(slice(0, width)), start - first, axis=1)

    widths = window_lengths(settings)
    reaching = sum((width >= length - active).astype(jnp.int32) for width in widths)
    found = lax.switch(reaching - 1, [lambda width=width: states(width) for width in widths])
    return functools.partial(pick, found), cache
