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
from gdsd_jax.denoiser.blocks import Grid, block_states, grid_of, prefilled, stored
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
    part, limit = settings.block_length, step_limit(config, settings)
    real = jnp.ones(prompts.shape, bool) if prompt_mask is None else prompt_mask.astype(bool)
    grid = grid_of(config, prompt_length, length, None if prompt_mask is None else real)
    region = grid.width - grid.first
    partly = settings.cache == "dual" and part < grid.size
    settings = dataclasses.replace(
        settings, completion_length=region, steps=settings.scheduled_steps * (region // part), cache="none"
    )
    beyond = ((0, 0), (0, length))
    text = jnp.pad(prompts.astype(jnp.int32), beyond, constant_values=config.mask_token_id)
    columns = constrain(grid.put(text, config.pad_token_id), ("rows", "tokens"))
    seen = grid.put(jnp.pad(real, beyond, constant_values=True), False)
    given = ~grid.put(jnp.broadcast_to(jnp.arange(prompt_length + length) >= prompt_length, text.shape), False)
    base, lora = repeated(config, base, lora, tokens=limit * rows * grid.size)
    writer = _Writer(config, base, lora, settings, partly, row_keys(key, rows, numbers), grid, seen, given)

    with jax.named_scope("prefill"):
        cache, carried = writer.prefilled(columns)
    start = _Loop(beginning(config, settings, columns, limit), cache, carried)
    state = lax.while_loop(writer.unfinished, writer.one_block, start).state
    take = lambda x: grid.take(x, jnp.arange(prompt_length, prompt_length + length), grid.first)  # noqa: E731
    written = take(state.tokens[:, grid.first :])
    if settings.stop_at_eos:
        fill = (written == config.mask_token_id) & writer.ended(state.tokens)[:, None]
        written = jnp.where(fill, config.eos_token_id, written)
    arrays = map(take, (state.commit_step, state.confidence, *state.recorded))
    whole = jnp.concatenate([prompts.astype(jnp.int32), written], axis=1)
    return Rollout(*(constrain(array, ("rows", "tokens")) for array in (whole, *arrays)))


class _Writer(NamedTuple):
    """Writes the blocks of one rollout; its attributes never change.

    Attributes:
      settings: as if the columns from `grid.first` on were the completion.
      partly: whether a step runs only the part of a block that is being written.
      keys: [B], those of `row_keys`.
      seen: [B, W], False on pads.
      given: [B, W], False on the columns of the completion.
    """

    config: DenoiserConfig
    base: dict
    lora: LoRA | None
    settings: SamplerConfig
    partly: bool
    keys: Array
    grid: Grid
    seen: Array
    given: Array

    @property
    def passes(self) -> int:
        """Returns how often each row is run: with guidance twice, once without its prompt."""
        return 1 if self.settings.cfg_scale == 0 else 2

    def inputs(self, tokens: Array) -> Array:
        """Returns the rows that the denoiser runs, in which the passes of a row are adjacent."""
        if self.passes == 1:
            return tokens
        without_prompt = jnp.where(self.given, self.config.mask_token_id, tokens)
        return jnp.stack([tokens, without_prompt], 1).reshape(-1, self.grid.width)

    def for_passes(self, x: Array) -> Array:
        """Repeats each row for each of its passes."""
        return jnp.repeat(x, self.passes, axis=0)

    def layout(self, tokens: Array) -> tuple[Array, Array]:
        """Returns which columns are attended to, [B, W], and the positions of all columns, [W] or [B, W]."""
        if not self.settings.hide_pads:
            return self.seen, jnp.arange(self.grid.width)
        valid = self.seen & (tokens != self.config.pad_token_id)
        return valid, jnp.cumsum(valid, axis=1) - valid

    def rotation(self, positions: Array) -> tuple[Array, Array]:
        """Returns the rotation tables of positions, which are [S], or [B, S] for each row's own."""
        tables = lambda place: ops.rope_tables(place, self.config.head_dim, self.config.rope_theta)  # noqa: E731
        if positions.ndim == 1:
            return tables(positions)
        return jax.tree.map(self.for_passes, jax.vmap(tables)(positions))

    def prefilled(self, columns: Array) -> tuple[Any, Array]:
        """Runs the blocks that the prompts finish; see `denoiser.blocks.prefilled`."""
        head = slice(0, self.grid.first)
        valid, positions = self.layout(columns)
        real, rope = self.for_passes(valid[:, head]), self.rotation(positions[..., head])
        tokens = self.inputs(columns)[:, head]
        return prefilled(self.config, self.base, self.lora, tokens, real, self.grid.width, rope)

    def run_block(self, cache: Any, tokens: Array, start: Array, arranged: tuple[Array, Array]) -> Any:
        """Runs the block that begins at the column `start`, after the cached columns; see `block_states`."""
        valid, positions = arranged
        cut = lambda x: lax.dynamic_slice_in_dim(x, start, self.grid.size, axis=-1)  # noqa: E731
        rope = self.rotation(cut(positions))
        before = self.for_passes(valid & (jnp.arange(self.grid.width) < start))
        block, real = cut(self.inputs(tokens)), self.for_passes(cut(valid))
        return block_states(self.config, self.base, self.lora, block, cache, before, rope, real, start)

    def aligned(self, last: Any, carried: Array, offset: Array) -> Read:
        """Returns a function from positions to target-aligned hidden states of the block that `last` has run.

        Positions are counted from `offset` in the block. The first one may be predicted by the state `carried`.
        """

        def read(place: Array) -> Array:
            if not self.config.next_token_logits:
                return last(place + offset)[0]
            index = place + offset - 1
            hidden = last(jnp.maximum(index, 0))[0]
            return jnp.where((index < 0)[..., None], carried[:, None], hidden)

        return read

    def part_states(
        self, tokens: Array, cache: Any, start: Array, offset: Array, arranged: tuple[Array, Array], known: Array
    ) -> tuple[Array, Any]:
        """Returns the states of the part of a block that is being written, and the cache of keys and values.

        If the block's keys and values are not `known` yet, or the first token of the part is masked in any row, the
        whole block is run and its keys and values are refreshed in the cache. Otherwise only the part is run.
        """
        config, size, part = self.config, self.grid.size, self.settings.block_length
        place, begin = jnp.arange(part), start + offset
        cut = lambda x: lax.dynamic_slice_in_dim(x, begin, part, axis=-1)  # noqa: E731
        nothing = jnp.zeros((self.passes * len(tokens), config.hidden_size), config.dtype)

        def whole(cache: Any) -> tuple[Array, Any]:
            last = self.run_block(cache, tokens, start, arranged)
            return self.aligned(last, nothing, offset)(place), stored(config, cache, last(slice(0, 1))[1], start)

        def window(cache: Any) -> tuple[Array, Any]:
            valid, _ = arranged
            column = jnp.arange(self.grid.width)
            around = (column < start + size) & ((column < begin) | (column >= begin + part))
            rope = self.rotation(begin + place)
            outside, real = self.for_passes(valid & around), self.for_passes(cut(valid))
            inputs = cut(self.inputs(tokens))
            last = block_states(config, self.base, self.lora, inputs, cache, outside, rope, real, begin)
            return self.aligned(last, nothing, jnp.zeros((), jnp.int32))(place), cache

        masked = lax.dynamic_index_in_dim(tokens, begin, axis=1, keepdims=False) == config.mask_token_id
        return lax.cond(jnp.any(masked) | ~known, whole, window, cache)

    def led(self, state: State, carried: Array, block: Array) -> State:
        """Commits the first token of a block, which the last state of the block before predicts."""
        # A threshold of 0 commits the token, whatever its probability. No block has the number `region`.
        whatever = dataclasses.replace(self.settings, threshold=0.0, factor=None)
        first = lambda place: jnp.broadcast_to(carried[:, None], (*place.shape, carried.shape[-1]))  # noqa: E731
        region = self.settings.completion_length
        keys = jax.vmap(jax.random.fold_in, (0, None))(self.keys, region)
        led = commit(self.config, self.base, keys, whatever, state, first, (block * self.grid.size, 1))
        return led._replace(block=state.block, step_in_block=state.step_in_block)

    def one_block(self, loop: _Loop) -> _Loop:
        """Takes the steps that write a block, and runs it once more for its keys and values."""
        state, cache, carried = loop
        size, part = self.grid.size, self.settings.block_length
        block = state.block * part // size
        start = self.grid.first + block * size
        arranged = self.layout(state.tokens)

        def step(loop: tuple[State, Any, Array]) -> tuple[State, Any, Array]:
            state, cache, known = loop
            offset = state.block * part - block * size
            with jax.named_scope("denoise"):
                if self.partly:
                    hidden, cache = self.part_states(state.tokens, cache, start, offset, arranged, known)
                    read = functools.partial(pick, hidden)
                else:
                    read = self.aligned(self.run_block(cache, state.tokens, start, arranged), carried, offset)
            state = commit(self.config, self.base, self.keys, self.settings, state, read, (state.block * part, part))
            return state, cache, jnp.ones((), bool)

        if self.settings.lead and self.config.next_token_logits:
            state = self.led(state, carried, block)
        inside = lambda loop: loop[0].block * part // size == block  # noqa: E731
        state, cache, _ = lax.while_loop(inside, step, (state, cache, jnp.zeros((), bool)))
        with jax.named_scope("finish"):
            last = self.run_block(cache, state.tokens, start, self.layout(state.tokens))
            hidden, new = last(slice(size - 1, size))
            return _Loop(state, stored(self.config, cache, new, start), hidden[:, 0])

    def ended(self, tokens: Array) -> Array:
        """Returns whether the completion of each row holds an id that ends it, [B]; masks are no such id."""
        return jnp.any(ends(self.config, tokens) & ~self.given, axis=1)

    def unfinished(self, loop: _Loop) -> Array:
        """Returns whether a block remains to be written."""
        more = loop.state.block < self.settings.blocks
        return more & ~jnp.all(self.ended(loop.state.tokens)) if self.settings.stop_at_eos else more
