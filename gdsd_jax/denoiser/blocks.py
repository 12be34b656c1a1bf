"""Forward passes of block-causal denoisers, on a grid where the blocks of all rows occupy the same columns.

`noisy_states_at` runs a clean text together with a noisy copy of its blocks in one pass. The other functions run block
after block: a finished block never changes, so its keys and values are kept exactly.

B rows, P prompt tokens, L completion tokens, T = P + L, W columns of the grid, D model size, K head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gdsd_jax.denoiser import attention
from gdsd_jax.denoiser.attention import appended
from gdsd_jax.denoiser.config import DenoiserConfig
from gdsd_jax.denoiser.forward import At, Read, real_tokens, rope_of, run
from gdsd_jax.denoiser.layout import Layout
from gdsd_jax.denoiser.lora import LoRA
from gdsd_jax.denoiser.model import Context, KeyValues


class Grid(NamedTuple):
    """Places the tokens of left-padded rows so that a block occupies the same columns in every row.

    Attributes:
      size: number of columns in a block.
      width: W, the number of columns, a multiple of `size`.
      first: the first column of the first block that holds completion tokens, in any row.
      shift: `[B, 1]` or `[1, 1]`; token `i` of a row lies at column `i + shift`.
    """

    size: int
    width: int
    first: int
    shift: Array

    def put(self, x: Array, fill: Any) -> Array:
        """Puts the values of tokens, `[B, T]`, on the grid, `[B, W]`; columns without a token get the value `fill`."""
        index = jnp.arange(self.width) - self.shift
        inside = (index >= 0) & (index < x.shape[1])
        within = jnp.clip(jnp.broadcast_to(index, (len(x), self.width)), 0, x.shape[1] - 1)
        return jnp.where(inside, jnp.take_along_axis(x, within, axis=1), fill)

    def take(self, x: Array, at: Array, first: int = 0) -> Array:
        """Takes the values of the tokens `at`, `[S]`, from `x`, which holds the columns of the grid from `first` on."""
        index = jnp.broadcast_to(at + self.shift - first, (len(x), at.shape[-1]))
        return jnp.take_along_axis(x, index, axis=1)


def grid_of(config: DenoiserConfig, prompt_length: int, length: int, prompt_mask: Array | None) -> Grid:
    """Lays out rows of `prompt_length` prompt and `length` completion tokens; `prompt_mask` is `[B, P]` or `[B, T]`."""
    size = config.block_size
    if config.block_origin == "column":
        first = -(-prompt_length // size) * size
        return Grid(size, first + -(-length // size) * size, first, jnp.full((1, 1), first - prompt_length))
    first = prompt_length // size * size
    if prompt_mask is None:
        return Grid(size, first + -(-(prompt_length - first + length) // size) * size, first, jnp.zeros((1, 1), int))
    # If the last tokens of a prompt do not fill a block, they share it with the completion. The shift puts this block
    # into the same columns in every row.
    prompt = jnp.sum(prompt_mask[:, :prompt_length].astype(jnp.int32), axis=1, keepdims=True)
    return Grid(size, first + -(-(size - 1 + length) // size) * size, first, prompt % size - prompt_length % size)


def noisy_states_at(
    config: DenoiserConfig,
    base: Any,
    lora: LoRA | None,
    tokens: Int[Array, "B T"],
    noisy: Int[Array, "B T"],
    *,
    length: int,
    prompt_mask: Bool[Array, "B P"] | None = None,
    dropout_key: Array | None = None,
) -> Read:
    """Runs a clean and a noisy copy of a text in one pass; returns a function that reads the noisy completion.

    Each noisy block attends to the clean blocks before it, as when text is written block after block. Where raw logits
    predict the next token, the first token of a block is read from the last token of the clean block before it.

    Args:
      tokens: clean prompts and completions; the completion is the last `length` tokens.
      noisy: the same texts with masked tokens. Both copies take their prompts from here, masked tokens included.

    Returns:
      A function like that of `hidden_states_at`, for positions in the completion.
    """
    total = tokens.shape[1]
    real = real_tokens(prompt_mask, *tokens.shape)
    grid = grid_of(config, total - length, length, real)
    clean = jnp.where(jnp.arange(total) < total - length, noisy, tokens)
    seen = grid.put(jnp.ones_like(tokens, bool) if real is None else real, False)
    layout = Layout(grid.size, grid.width, grid.first)

    def both(one: Array, other: Array) -> Array:
        return jnp.concatenate([one, other[:, grid.first :]], axis=1)

    columns = both(*(grid.put(x, config.pad_token_id) for x in (clean, noisy)))
    tables = rope_of(config, columns.shape[1], layout)
    context = Context(both(seen, seen), tables)
    last = run(config, base, lora, columns, context, layout=layout, dropout_key=dropout_key)

    def read(at: At | None) -> Array:
        every = jnp.arange(total)
        places = every if at is None else every[at] if isinstance(at, slice) else at
        column = jnp.broadcast_to(places + grid.shift, (len(tokens), places.shape[-1]))
        index = column + grid.width - grid.first
        if config.next_token_logits:
            index = jnp.where(column % grid.size == 0, jnp.maximum(column - 1, 0), index - 1)
        return last(index)[0]

    return read


def prefilled(
    config: DenoiserConfig,
    base: Any,
    lora: LoRA | None,
    tokens: Int[Array, "B F"],
    real: Bool[Array, "B F"] | None,
    width: int,
    rope: tuple[Array, Array],
) -> tuple[Any, Float[Array, "B D"]]:
    """Runs the finished blocks of the prompts.

    Returns:
      Their keys and values, with room for `width` columns; and the hidden states of the last column after the final
      norm, which are zero if the prompts have no finished block.
    """
    rows, length = tokens.shape
    axes = _token_axes(config)
    if length == 0:

        def one_column(tokens: Array) -> Any:
            return run(config, base, lora, tokens, Context(None, rope_of(config, 1)), keep=True)(slice(0, 1))

        # A pass over one column shows the shapes; nothing is computed.
        shapes = jax.eval_shape(one_column, jnp.zeros((rows, 1), tokens.dtype))
        hidden, cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    else:
        layout = Layout(config.block_size, length)
        last = run(config, base, lora, tokens, Context(real, rope), layout=layout, keep=True)
        hidden, cache = last(slice(length - 1, length))

    def with_room(kv: KeyValues) -> KeyValues:
        return KeyValues(*(appended(x, axis, width - max(1, length)) for x, axis in zip(kv, axes, strict=True)))

    return _each(with_room, cache), hidden[:, 0]


def block_states(
    config: DenoiserConfig,
    base: Any,
    lora: LoRA | None,
    tokens: Int[Array, "B S"],
    cache: Any,
    seen: Bool[Array, "B W"],
    rope: tuple[Array, Array],
    real: Bool[Array, "B S"] | None,
    start: Int[Array, ""],
) -> Any:
    """Runs the columns of one block, from `start` on, which attend to each other and to the cached columns `seen`.

    Returns the function that `run` returns, with `keep`.
    """
    if attention.chosen(config) == "cudnn":
        inside = jnp.ones(tokens.shape, bool) if real is None else real
        seen = jax.lax.dynamic_update_slice_in_dim(seen, inside, start, axis=1)
    return run(config, base, lora, tokens, Context(real, rope, seen, start), cache=cache, keep=True)


def stored(config: DenoiserConfig, cache: Any, new: Any, start: Int[Array, ""]) -> Any:
    """Writes a block's keys and values into the cache, from the column `start` on, and returns the cache.

    Args:
      new: the keys and values that `block_states` gave. Under cuDNN they are the whole cache already.
    """
    if attention.chosen(config) == "cudnn":
        return new
    axes = _token_axes(config)

    def store(old: KeyValues, new: KeyValues) -> KeyValues:
        write = jax.lax.dynamic_update_slice_in_dim
        return KeyValues(*(write(x, y, start, axis % x.ndim) for x, y, axis in zip(old, new, axes, strict=True)))

    return _each(store, cache, new)


def _token_axes(config: DenoiserConfig) -> tuple[int, int]:
    """Returns the token axis of the keys and that of the values, counted from the end."""
    return (-3, -3) if attention.chosen(config) == "cudnn" else (-1, -2)


def _each(function: Callable[..., KeyValues], *caches: Any) -> Any:
    """Maps a function over the `KeyValues` of all layers."""
    return jax.tree.map(function, *caches, is_leaf=lambda x: isinstance(x, KeyValues))
