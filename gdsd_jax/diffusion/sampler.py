"""Iterative unmasking: a masked denoiser writes completions in a loop that is one compiled program.

A step proposes one candidate token per masked position, scores the candidates, and commits the best of them; a
`remasking.Strategy` defines the three parts.

B rows, P prompt tokens, L completion tokens, T = P + L, S positions of the region that a step reads (the active block,
or the whole completion), D hidden size, V vocabulary.

Sources: the public samplers of masked language models (low-confidence remasking in blocks with a fixed number of tokens
per step; a time schedule with a confidence ordering), and Fast-dLLM (arXiv 2505.22618) for `threshold` and `factor`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Int

from gdsd_jax.denoiser import DenoiserConfig, LoRA, hidden_states_at, pick, repeated
from gdsd_jax.denoiser.forward import real_tokens
from gdsd_jax.diffusion.blocks import fits_blocks, sample_blocks
from gdsd_jax.diffusion.cache import cached_states_at, refresh, region
from gdsd_jax.diffusion.remasking import SamplerConfig
from gdsd_jax.diffusion.step import Rollout, State, beginning, commit, finished, passes, row_keys
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.sharding import constrain


def sample(
    config: DenoiserConfig,
    base: dict,
    lora: LoRA | None,
    prompts: Int[Array | np.ndarray, "B P"],
    prompt_mask: Array | np.ndarray | None,
    key: Array,
    settings: SamplerConfig,
    numbers: Int[Array | np.ndarray, " B"] | None = None,
) -> Rollout:
    """Samples completions of left-padded prompts.

    The function is pure, and is compiled once per shape, config and settings. Every draw depends only on `key`, the
    row's number, the block and the step in the block; neither left padding nor other rows of the batch change it.

    Args:
      prompts: [B, P] int32.
      prompt_mask: [B, P], True on real tokens; None: all are real.
      numbers: [B] int32, the numbers of these rows in a rollout that is sampled in parts; None: 0 to B - 1.

    Raises:
      UserError: the sequence or a token id does not fit the model, or the mask does not fit the prompts.
    """
    if prompt_mask is not None and prompt_mask.shape != prompts.shape:
        raise UserError(f"prompt_mask has shape {prompt_mask.shape} and prompts {prompts.shape}; they must be equal")
    check_fits(config, prompts.shape[1], settings)
    return compiled_sample(config, base, lora, prompts, prompt_mask, key, settings, numbers)


def check_fits(config: DenoiserConfig, prompt_length: int, settings: SamplerConfig) -> None:
    """Raises UserError if prompt and completion, or a token id of the settings, do not fit the model."""
    length = prompt_length + settings.completion_length
    if length > config.max_length:
        raise UserError(
            f"prompt ({prompt_length}) and completion_length ({settings.completion_length}) make {length} tokens, and "
            f"the model takes at most {config.max_length}; shorten completion_length or the prompts"
        )
    if settings.cache != "none" and config.next_token_logits and prompt_length == 0:
        raise UserError("the model predicts the next token, so a cache needs a prompt; give one, or set cache='none'")
    if config.block_size is not None:
        fits_blocks(config, prompt_length, settings)
    for name in ("suppress", "suppress_confidence", "end_think"):
        if any(not 0 <= token < config.vocab_size for token in getattr(settings, name)):
            raise UserError(f"{name} {getattr(settings, name)} has ids outside the vocabulary of {config.vocab_size}")


def replay(rollout: Rollout, config: DenoiserConfig, step: int) -> Int[Array, "B T"]:
    """Returns the tokens [B, P+L] as they were after `step`; -1 gives the fully masked start.

    The result is exact although only the last write of each position is recorded, because a position is written again
    only while it holds a mask. Positions that `stop_at_eos` filled in stay masked until `SamplerConfig.step_limit`.
    """
    prompt_length = rollout.tokens.shape[1] - rollout.commit_step.shape[1]
    later = jnp.pad(rollout.commit_step > step, ((0, 0), (prompt_length, 0)))
    return jnp.where(later, config.mask_token_id, rollout.tokens)


@functools.partial(jax.jit, static_argnames=("config", "settings"))
def compiled_sample(
    config: DenoiserConfig,
    base: dict,
    lora: LoRA | None,
    prompts: Int[Array | np.ndarray, "B P"],
    prompt_mask: Array | np.ndarray | None,
    key: Array,
    settings: SamplerConfig,
    numbers: Int[Array | np.ndarray, " B"] | None = None,
) -> Rollout:
    """Samples as `sample` does, without its checks; this is the jitted program."""
    if config.block_size is not None:
        return sample_blocks(config, base, lora, prompts, prompt_mask, key, settings, numbers)
    rows, prompt_length = prompts.shape
    length = settings.completion_length
    completion = jnp.full((rows, length), config.mask_token_id, jnp.int32)
    return unmask(config, base, lora, prompts, completion, prompt_mask, key, settings, numbers)


@functools.partial(jax.jit, static_argnames=("config", "settings"))
def infill(
    config: DenoiserConfig,
    base: dict,
    lora: LoRA | None,
    tokens: Int[Array | np.ndarray, "B L"],
    real: Array | np.ndarray | None,
    key: Array,
    settings: SamplerConfig,
) -> Rollout:
    """Fills in the mask tokens of `tokens` [B, L], where L is the completion length of the settings.

    Blocks are counted from the first column. The denoiser must have full attention.

    Args:
      real: [B, L], False on pads; None: all tokens are real.
    """
    rows = len(tokens)
    given = None if real is None else real.astype(bool)
    return unmask(config, base, lora, jnp.zeros((rows, 0), jnp.int32), tokens, given, key, settings)


def unmask(
    config: DenoiserConfig,
    base: dict,
    lora: LoRA | None,
    prompts: Array,
    completion: Array,
    real: Array | None,
    key: Array,
    settings: SamplerConfig,
    numbers: Array | None = None,
) -> Rollout:
    """Runs the loop of steps under full attention, which fills in the masks of `completion` [B, L].

    Args:
      real: [B, P] or [B, P + L], False on pads; None: all tokens are real.
    """
    rows, prompt_length = prompts.shape
    length, limit = settings.completion_length, settings.step_limit
    beyond = settings.blocks * settings.block_length - length
    prompt_mask = None if real is None else real.astype(bool)
    if beyond:
        # The last block is filled up with pads; no token attends to them, and nothing is written there.
        prompt_mask = real_tokens(jnp.ones((rows, 0), bool) if real is None else real, rows, prompt_length + length)
        prompt_mask = jnp.pad(prompt_mask, ((0, 0), (0, beyond)))
        completion = jnp.pad(completion, ((0, 0), (0, beyond)), constant_values=config.pad_token_id)
        steps = settings.scheduled_steps * settings.blocks
        settings = dataclasses.replace(settings, completion_length=length + beyond, steps=steps)
    tokens = jnp.concatenate([prompts.astype(jnp.int32), completion.astype(jnp.int32)], axis=1)
    start = beginning(config, settings, constrain(tokens, ("rows", "tokens")), limit)

    def unfinished(state: State) -> Array:
        more = state.block < settings.blocks
        if settings.stop_at_eos:
            ended = jnp.all(finished(config, state.tokens[:, prompt_length:]))
            more &= ~(ended & (state.step_in_block == 0)) if settings.grow else ~ended
        return more

    # Each step computes at least one block.
    cached = settings.cache != "none"
    base, lora = repeated(config, base, lora, tokens=limit * rows * settings.block_length, cached=cached)
    keys = row_keys(key, rows, numbers)
    write = functools.partial(commit, config, base, keys, settings)

    def exact_step(state: State) -> State:
        with jax.named_scope("denoise"):
            seen = prompt_mask
            if settings.grow:
                grown = jnp.arange(tokens.shape[1]) < prompt_length + (state.block + 1) * settings.block_length
                seen = jnp.broadcast_to(grown, tokens.shape)
                seen = seen if prompt_mask is None else seen & real_tokens(prompt_mask, *tokens.shape)
            inputs, mask = passes(config, settings, state.tokens, seen)
            read = hidden_states_at(config, base, lora, inputs, prompt_mask=mask)
            first, _ = region(settings, state.block)
        return write(state, lambda place: read(prompt_length + first + place))

    def refreshed_steps(state: State) -> State:
        """Takes a full step and the cached steps up to the next full one.

        The cache is never copied: the loop over cached steps reads it as a constant or writes into it in place.
        """
        with jax.named_scope("refresh"):
            inputs, mask = passes(config, settings, state.tokens, prompt_mask)
            hidden, cache = refresh(config, base, lora, inputs, mask, state.block, settings)

        def cached_step(loop: tuple[State, Any]) -> tuple[State, Any]:
            state, cache = loop
            with jax.named_scope("denoise"):
                inputs, _ = passes(config, settings, state.tokens, prompt_mask)
                read, cache = cached_states_at(config, base, lora, hidden, cache, inputs, mask, state.block, settings)
            return write(state, read), cache

        def fresh_enough(loop: tuple[State, Any]) -> Array:
            state, _ = loop
            return unfinished(state) & (state.step_in_block % (settings.refresh_every or settings.steps_per_block) > 0)

        first = write(state, functools.partial(pick, hidden))
        return lax.while_loop(fresh_enough, cached_step, (first, cache))[0]

    step = exact_step if settings.cache == "none" else refreshed_steps
    end = lax.while_loop(unfinished, step, start)
    written = end.tokens[:, prompt_length : prompt_length + length]
    if settings.stop_at_eos:
        fill = (written == config.mask_token_id) & finished(config, written)[:, None]
        written = jnp.where(fill, config.eos_token_id, written)
    tokens = jnp.concatenate([end.tokens[:, :prompt_length], written], axis=1)
    arrays = (x[:, :length] for x in (end.commit_step, end.confidence, *end.recorded))
    return Rollout(*(constrain(array, ("rows", "tokens")) for array in (tokens, *arrays)))
