"""Approximate denoising: keys and values are kept while a block is decoded (Fast-dLLM, arXiv 2505.22618).

A refresh is a full pass. Until the next refresh, a step computes only a window of the completion: the active block
("dual"), or everything from the active block on ("prefix"). Positions outside the window keep their keys, values and
hidden states.

The window of the prefix cache shrinks from block to block, but the lengths of arrays are fixed when a program is
compiled. Therefore only a few lengths are used: that of the completion, halved again and again down to one block. Each
step takes the shortest window that reaches back to the active block. A program for eight blocks thus holds four windows
instead of eight, and they compute a fifth more tokens than windows of the exact length. Where a window begins before
the active block, the tokens before the block stay frozen.

B rows, T tokens, S positions of the region, D hidden size.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from gdsd_jax.denoiser import DenoiserConfig, LoRA, Read, attention, pick, refresh_cache, window_pass, window_states_at
from gdsd_jax.diffusion.remasking import SamplerConfig


def region(settings: SamplerConfig, block: Array) -> tuple[Array, int]:
    """Returns the region that a step reads: its first position in the completion, and its size S.

    The region is the active block; without blocks, or if earlier blocks may still hold masks, it is the completion.
    """
    if settings.forbid_mask and settings.blocks > 1:
        return block * settings.block_length, settings.block_length
    return jnp.zeros_like(block), settings.completion_length


def window_lengths(settings: SamplerConfig) -> tuple[int, ...]:
    """Returns the lengths of the windows that a program with these settings holds, the longest first."""
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
    """Runs a full pass over `tokens` [B, T]; returns hidden states of the region [B, S, D], and the cache.

    The cache holds the keys and values of all tokens; with "dual", whose only window is the active block, it leaves out
    those of the active block (see `denoiser.refresh_cache`).
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
    """Returns a function from positions of the region to their hidden states, and the cache for the next step.

    Inside the window, states are computed from `tokens` [B, T]; outside it, they are those of the last refresh,
    `hidden` [B, S, D]. The cache is returned unchanged, except that with "dual" under cuDNN it receives the window's
    keys and values.
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
        """Returns the region's hidden states, computed from the last `width` tokens of the block or the completion.

        The window ends with the active block ("dual") or with the completion ("prefix").
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
