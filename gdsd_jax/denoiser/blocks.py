"""Passes of block-causal denoisers: a text laid out on a grid of blocks, noisy blocks behind it, finished ones kept.

A finished block never changes, so its keys and values are kept exactly. B rows, P prompt tokens, L completion tokens,
T = P + L, W columns of the grid, D model size, K head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gdsd_jax.denoiser.config import DenoiserConfig
from gdsd_jax.denoiser.forward import At, Read, real_tokens, rope_of, run
from gdsd_jax.denoiser.layout import Layout
from gdsd_jax.denoiser.lora import LoRA
from gdsd_jax.denoiser.model import KeyValues


class Grid(NamedTuple):
    """Where the tokens of left-padded rows lie so that blocks are the same columns in every row.

    Attributes:
      size: columns of a block.
      width: W, a multiple of the block size.
      first: the first column of the first block that holds completion tokens, in any row.
      shift: `[B, 1]` or `[1, 1]`; token `i` of a row lies at column `i + shift`.
    """

    size: int
    width: int
    first: int
    shift: Array

    def put(self, x: Array, fill: Any) -> Array:
        """Puts `[B, T]` values of tokens on the grid, `[B, W]`, and `fill` where there is no token."""
        index = jnp.arange(self.width) - self.shift
        inside = (index >= 0) & (index < x.shape[1])
        taken = jnp.take_along_axis(x, jnp.clip(jnp.broadcast_to(index, (len(x), self.width)), 0, x.shape[1] - 1), 1)
        return jnp.where(inside, taken, fill)

    def take(self, x: Array, at: Array, first: int = 0) -> Array:
        """Takes the values of tokens `at` from `x`, which begins with the column `first`."""
        index = jnp.broadcast_to(at + self.shift - first, (len(x), at.shape[-1]))
        return jnp.take_along_axis(x, index, axis=1)


def grid_of(config: DenoiserConfig, prompt_length: int, length: int, prompt_mask: Array | None) -> Grid:
    """Lays out rows of so many prompt and completion tokens; `prompt_mask` is `[B, P]`, or `[B, T]`."""
    size = config.block_size
    if config.block_origin == "column":
        first = -(-prompt_length // size) * size
        return Grid(size, first + -(-length // size) * size, first, jnp.full((1, 1), first - prompt_length))
    first = prompt_length // size * size
    if prompt_mask is None:
        return Grid(size, first + -(-(prompt_length - first + length) // size) * size, first, jnp.zeros((1, 1), int))
    # The tail of a prompt that fills no block shares one with the completion: each row's is in the same columns.
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
    """Runs a clean and a noisy copy in one pass; gives target-aligned hidden states of the noisy completion.

    Each noisy block is seen behind the clean blocks before it, as when text is written block after block; where the
    logits speak of the next token, the first token of a block is read from the last of the clean block before it.
    The prompt is as in `noisy`, masked tokens included.

    Args:
      tokens: clean prompts and completions; the completion is the last `length` tokens.

    Returns:
      As `hidden_states_at`; asked for places in the completion.
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
    last = run(config, base, lora, columns, both(seen, seen), tables, layout=layout, dropout_key=dropout_key)

    def read(at: At | None) -> Array:
        places = jnp.arange(total) if at is None else jnp.arange(at.start, at.stop) if isinstance(at, slice) else at
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
) -> tuple[Any, Float[Array, "B D"]]:
    """Runs the finished blocks of the prompts; gives keys and values with room for `width` columns, and last states.

    The states are those of the last column, after the final norm; zero where there is no column.
    """
    rows, length = tokens.shape
    dtype = jnp.dtype(config.dtype)
    shape = (rows, config.num_kv_heads)
    if length == 0:
        one = KeyValues(
            jnp.zeros((*shape, config.head_dim, width), dtype), jnp.zeros((*shape, width, config.head_dim), dtype)
        )
        unrolled = config.layer_unroll >= config.num_layers
        stack = lambda x: jnp.zeros((config.num_layers, *x.shape), x.dtype)  # noqa: E731
        cache = (one,) * config.num_layers if unrolled else jax.tree.map(stack, one)
        return cache, jnp.zeros((rows, config.hidden_size), dtype)
    layout = Layout(config.block_size, length)
    last = run(config, base, lora, tokens, real, rope_of(config, length), layout=layout, keep=True)
    hidden, cache = last(slice(length - 1, length))
    room = lambda x, axis: jnp.pad(x, [(0, (width - length) * (n == axis % x.ndim)) for n in range(x.ndim)])  # noqa: E731
    return _each(lambda kv: KeyValues(room(kv.keys, -1), room(kv.values, -2)), cache), hidden[:, 0]


def block_states(
    config: DenoiserConfig,
    base: Any,
    lora: LoRA | None,
    tokens: Int[Array, "B S"],
    cache: Any,
    seen: Bool[Array, "B W"],
    rope: tuple[Array, Array],
    real: Bool[Array, "B S"] | None = None,
) -> Any:
    """Runs the columns of one block behind the cached columns that are `seen`; as `run`, keys and values included."""
    return run(config, base, lora, tokens, real, rope, cache=cache, outside=seen, keep=True)


def stored(cache: Any, new: Any, start: Int[Array, ""]) -> Any:
    """Returns the cache with keys and values of the columns from `start` on replaced."""

    def store(old: KeyValues, new: KeyValues) -> KeyValues:
        write = jax.lax.dynamic_update_slice_in_dim
        return KeyValues(write(old.keys, new.keys, start, -1), write(old.values, new.values, start, -2))

    return _each(store, cache, new)


def _each(function: Any, *caches: Any) -> Any:
    return jax.tree.map(function, *caches, is_leaf=lambda x: isinstance(x, KeyValues))
