"""Block diffusion: a block-causal denoiser writes block after block and keeps an exact cache of the finished ones.

The whole loop is one compiled program. A step computes only the block that is being written. A finished block is run
once more, without masks, for its keys and values, which never change afterwards. Rows whose prompts differ in length
write their blocks together. With `cache="dual"`, a step runs only the part of the block that is being written, which is
an approximation.

Sources: BD3LM (arXiv 2503.09573), SDAR (arXiv 2510.06303), Fast-dLLM v2 (arXiv 2509.26328).

Letters as in `sampler`, and W columns of the grid of blocks.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int

from gdsd_jax.denoiser import DenoiserConfig, LoRA, Read, ops, pick, repeated
from gdsd_jax.denoiser.blocks import block_states, grid_of, prefilled, stored
from gdsd_jax.diffusion.remasking import SamplerConfig
from gdsd_jax.diffusion.step import Rollout, State, beginning, commit, ends, row_keys
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.sharding import constrain


class _Loop(NamedTuple):
    state: State
    cache: Any  # keys and values of the W columns
    carried: Array  # [B, D] or, with guidance, [2B, D]: the last hidden state of the last finished block


def fits_blocks(config: DenoiserConfig, prompt_length: int, settings: SamplerConfig) -> None:
    """Raises UserError if the settings do not fit a block-causal denoiser."""
    if config.block_size % settings.block_length:
        raise UserError(
            f"block_length {settings.block_length} does not divide the {config.block_size} tokens of the model's "
            f"blocks: set config.sampler.block_length to {config.block_size} or a divisor"
        )
    if settings.cache == "prefix" or settings.refresh_every is not None:
        raise UserError(
            "a block-causal model keeps an exact cache of finished blocks: set config.sampler.cache='none', and "
            "refresh_every=None"
        )
    if settings.end_think:
        raise UserError("end_think is not supported by block-causal models: set config.sampler.end_think=()")
    if settings.cache == "dual" and settings.hide_pads:
        raise UserError("hide_pads moves positions, which cache='dual' keeps: set config.sampler.cache='none'")
    if config.next_token_logits and prompt_length == 0:
        raise UserError("the model predicts the next token, so the first block needs a prompt: give one")


def step_limit(config: DenoiserConfig, settings: SamplerConfig) -> int:
    """Returns the `commit_step` of positions that no step wrote; it is greater than the number of every step."""
    if config.block_size is None:
        return settings.step_limit
    columns = -(-(config.block_size - 1 + settings.completion_length) // config.block_size) * config.block_size
    return max(settings.steps, columns // settings.block_length * (settings.steps_per_block + 1))


def tail_length(config: DenoiserConfig, prompt_mask: Array | None, rows: int, prompt_length: int) -> Int[Array, " B"]:
    """Returns the number of tokens at the end of each prompt that share a block with the completion."""
    if config.block_size is None or config.block_origin == "column":
        return jnp.zeros(rows, jnp.int32)
    if prompt_mask is None:
        return jnp.full(rows, prompt_length % config.block_size, jnp.int32)
    return jnp.sum(prompt_mask[:, :prompt_length].astype(jnp.int32), axis=1) % config.block_size


def sample_blocks(
    config: DenoiserConfig,
    base: dict,
    lora: LoRA | None,
    prompts: Array,
    prompt_mask: Array | None,
    key: Array,
    settings: SamplerConfig,
    numbers: Array | None = None,
) -> Rollout:
    """Samples completions as `sampler.sample` does, for block-causal denoisers."""
    (rows, prompt_length), length = prompts.shape, settings.completion_length
    size, part, limit = config.block_size, settings.block_length, step_limit(config, settings)
    real = jnp.ones(prompts.shape, bool) if prompt_mask is None else prompt_mask.astype(bool)
    grid = grid_of(config, prompt_length, length, None if prompt_mask is None else real)
    region = grid.width - grid.first
    partly = settings.cache == "dual" and part < size
    settings = dataclasses.replace(
        settings, completion_length=region, steps=settings.scheduled_steps * (region // part), cache="none"
    )
    beyond = ((0, 0), (0, length))
    text = jnp.pad(prompts.astype(jnp.int32), beyond, constant_values=config.mask_token_id)
    columns = constrain(grid.put(text, config.pad_token_id), ("rows", "tokens"))
    seen = grid.put(jnp.pad(real, beyond, constant_values=True), False)
    given = ~grid.put(jnp.broadcast_to(jnp.arange(prompt_length + length) >= prompt_length, text.shape), False)
    base, lora = repeated(config, base, lora, tokens=limit * rows * size)
    keys = row_keys(key, rows, numbers)
    passes = 1 if settings.cfg_scale == 0 else 2

    def inputs(tokens: Array) -> Array:
        """Returns the rows that the denoiser runs; with guidance the two passes of a row are adjacent."""
        if passes == 1:
            return tokens
        return jnp.stack([tokens, jnp.where(given, config.mask_token_id, tokens)], 1).reshape(-1, grid.width)

    def for_passes(x: Array) -> Array:
        """Repeats each row for each of its passes."""
        return jnp.repeat(x, passes, axis=0)

    def layout(tokens: Array) -> tuple[Array, Array]:
        """Returns which columns are attended to, [B, W], and the positions of all columns, [W] or [B, W]."""
        if not settings.hide_pads:
            return seen, jnp.arange(grid.width)
        valid = seen & (tokens != config.pad_token_id)
        return valid, jnp.cumsum(valid, axis=1) - valid

    def rotation(positions: Array) -> tuple[Array, Array]:
        """Returns the rotation tables of positions, which are [S], or [B, S] for each row's own."""
        tables = lambda place: ops.rope_tables(place, config.head_dim, config.rope_theta)  # noqa: E731
        return tables(positions) if positions.ndim == 1 else jax.tree.map(for_passes, jax.vmap(tables)(positions))

    def run_block(cache: Any, tokens: Array, start: Array, arranged: tuple[Array, Array]) -> Any:
        """Runs the block that begins at the column `start`, after the cached columns; see `block_states`."""
        valid, positions = arranged
        cut = lambda x: lax.dynamic_slice_in_dim(x, start, size, axis=-1)  # noqa: E731
        rope = rotation(cut(positions))
        before = for_passes(valid & (jnp.arange(grid.width) < start))
        return block_states(config, base, lora, cut(inputs(tokens)), cache, before, rope, for_passes(cut(valid)), start)

    def aligned(last: Any, carried: Array, offset: Array) -> Read:
        """Returns a function from positions to target-aligned hidden states of the block that `last` has run.

        Positions are counted from `offset` in the block. The first one may be predicted by the state `carried`.
        """

        def read(place: Array) -> Array:
            if not config.next_token_logits:
                return last(place + offset)[0]
            index = place + offset - 1
            hidden = last(jnp.maximum(index, 0))[0]
            return jnp.where((index < 0)[..., None], carried[:, None], hidden)

        return read

    def part_states(
        tokens: Array, cache: Any, start: Array, offset: Array, arranged: Any, known: Array
    ) -> tuple[Array, Any]:
        """Returns the states of the part of a block that is being written, and the cache of keys and values.

        If the block's keys and values are not `known` yet, or the first token of the part is masked in any row, the
        whole block is run and its keys and values are refreshed in the cache. Otherwise only the part is run.
        """
        place, begin = jnp.arange(part), start + offset
        cut = lambda x: lax.dynamic_slice_in_dim(x, begin, part, axis=-1)  # noqa: E731
        nothing = jnp.zeros((passes * rows, config.hidden_size), config.dtype)

        def whole(cache: Any) -> tuple[Array, Any]:
            last = run_block(cache, tokens, start, arranged)
            return aligned(last, nothing, offset)(place), stored(config, cache, last(slice(0, 1))[1], start)

        def window(cache: Any) -> tuple[Array, Any]:
            valid, _ = arranged
            column = jnp.arange(grid.width)
            around = (column < start + size) & ((column < begin) | (column >= begin + part))
            rope = rotation(begin + place)
            outside, real = for_passes(valid & around), for_passes(cut(valid))
            last = block_states(config, base, lora, cut(inputs(tokens)), cache, outside, rope, real, begin)
            return aligned(last, nothing, jnp.zeros((), jnp.int32))(place), cache

        masked = lax.dynamic_index_in_dim(tokens, begin, axis=1, keepdims=False) == config.mask_token_id
        return lax.cond(jnp.any(masked) | ~known, whole, window, cache)

    def one_block(loop: _Loop) -> _Loop:
        state, cache, carried = loop
        block = state.block * part // size
        start = grid.first + block * size
        arranged = layout(state.tokens)

        def step(loop: tuple[State, Any, Array]) -> tuple[State, Any, Array]:
            state, cache, known = loop
            offset = state.block * part - block * size
            with jax.named_scope("denoise"):
                if partly:
                    hidden, cache = part_states(state.tokens, cache, start, offset, arranged, known)
                    read = functools.partial(pick, hidden)
                else:
                    read = aligned(run_block(cache, state.tokens, start, arranged), carried, offset)
            state = commit(config, base, keys, settings, state, read, (state.block * part, part))
            return state, cache, jnp.ones((), bool)

        if settings.lead and config.next_token_logits:
            # A threshold of 0 commits the first token, whatever its probability. No block has the number `region`.
            whatever = dataclasses.replace(settings, threshold=0.0, factor=None)
            first = lambda place: jnp.broadcast_to(carried[:, None], (*place.shape, carried.shape[-1]))  # noqa: E731
            lead_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, region)
            led = commit(config, base, lead_keys, whatever, state, first, (block * size, 1))
            state = led._replace(block=state.block, step_in_block=state.step_in_block)
        inside = lambda loop: loop[0].block * part // size == block  # noqa: E731
        state, cache, _ = lax.while_loop(inside, step, (state, cache, jnp.zeros((), bool)))
        with jax.named_scope("finish"):
            last = run_block(cache, state.tokens, start, layout(state.tokens))
            hidden, new = last(slice(size - 1, size))
            return _Loop(state, stored(config, cache, new, start), hidden[:, 0])

    def ended(tokens: Array) -> Array:
        """Returns whether the completion of each row holds an id that ends it, [B]; masks are no such id."""
        return jnp.any(ends(config, tokens) & ~given, axis=1)

    def unfinished(loop: _Loop) -> Array:
        more = loop.state.block < region // part
        return more & ~jnp.all(ended(loop.state.tokens)) if settings.stop_at_eos else more

    with jax.named_scope("prefill"):
        head = slice(0, grid.first)
        valid, positions = layout(columns)
        real, rope = for_passes(valid[:, head]), rotation(positions[..., head])
        cache, carried = prefilled(config, base, lora, inputs(columns)[:, head], real, grid.width, rope)
    loop = lax.while_loop(unfinished, one_block, _Loop(beginning(config, settings, columns, limit), cache, carried))
    state = loop.state
    take = lambda x: grid.take(x, jnp.arange(prompt_length, prompt_length + length), grid.first)  # noqa: E731
    written = take(state.tokens[:, grid.first :])
    if settings.stop_at_eos:
        fill = (written == config.mask_token_id) & ended(state.tokens)[:, None]
        written = jnp.where(fill, config.eos_token_id, written)
    arrays = map(take, (state.commit_step, state.confidence, *state.recorded))
    whole = jnp.concatenate([prompts.astype(jnp.int32), written], axis=1)
    return Rollout(*(constrain(array, ("rows", "tokens")) for array in (whole, *arrays)))
