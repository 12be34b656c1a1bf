"""The forward process: which tokens of a clean sequence are hidden from the denoiser.

The functions draw or derive `masked`, which is True where the mask token replaces a token. Masks of whole sequences
leave the prompt clean.

B rows, V views, L completion tokens, T = P + L tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gdsd_jax.runtime.errors import UserError


def stratified_counts(k: Int[Array, ""] | int, rows: int, length: int) -> Int[Array, " rows"]:
    """Returns the number of masked tokens of each row, spread evenly over `0..L` from the offset `k` (GDSD, ESPO).

    It is `x_i = round(linspace(k, k + (b-1)(L+1)/b, b))_i mod (L+1)` for `b` rows, rounded half to even in float32.
    """
    offsets = jnp.arange(rows, dtype=jnp.float32) * jnp.float32((length + 1) / rows)
    return jnp.round(jnp.float32(k) + offsets).astype(jnp.int32) % (length + 1)


def at_random(key: Array, counts: Int[Array, " B"], length: int) -> Bool[Array, "B L"]:
    """Masks `counts` positions of each row, drawn without replacement."""
    return _lowest(jax.random.uniform(key, (counts.shape[0], length)), counts)


def in_rollout_order(
    key: Array, counts: Int[Array, " B"], confidence: Float[Array, "B L"] | None, block_length: int, length: int
) -> Bool[Array, "B L"]:
    """Masks the tokens that a left-to-right block sampler would not have committed yet (GDSD, latest revision).

    In a row whose count is `x`, the last `x // block_length` blocks are masked whole. In the block before them, the
    remaining `x % block_length` positions are masked: those with the least confidence, or random ones if `confidence`
    is None.

    Raises:
      UserError: the block length does not divide the completion.
    """
    if length % block_length:
        raise UserError(f"the method's block_length {block_length} does not divide the completion length {length}")
    noise = jax.random.uniform(key, (counts.shape[0], length)) if confidence is None else confidence
    blocks = length // block_length
    whole, partial = counts // block_length, counts % block_length
    block = jnp.arange(length) // block_length
    suffix = block[None, :] >= (blocks - whole)[:, None]
    current = block[None, :] == (blocks - whole - 1)[:, None]
    return suffix | (current & _lowest(jnp.where(current, noise, jnp.inf), partial))


def stratified(
    key: Array,
    rows: int,
    length: int,
    *,
    stratum: int,
    confidence: Float[Array, "B L"] | None = None,
    block_length: int | None = None,
) -> Bool[Array, "B L"]:
    """Draws masks so that every run of `stratum` rows covers all mask ratios evenly.

    Positions are uniform, or follow `in_rollout_order` if `block_length` is given.
    """
    offset_key, position_key = jax.random.split(key)
    k = jax.random.randint(offset_key, (rows // stratum,), 0, length + 1)
    counts = jax.vmap(lambda k: stratified_counts(k, stratum, length))(k).reshape(rows)
    if block_length is None:
        return at_random(position_key, counts, length)
    return in_rollout_order(position_key, counts, confidence, block_length, length)


def bernoulli(key: Array, ratio: Float[Array, "B _"] | float, rows: int, length: int) -> Bool[Array, "B L"]:
    """Masks each position independently with probability `ratio`."""
    return jax.random.uniform(key, (rows, length)) < ratio


def behind_prompt(masked: Bool[Array, "*V B L"], prompt_length: int) -> Bool[Array, "*V B T"]:
    """Extends masks of the completion by a clean prompt of `prompt_length` tokens."""
    return jnp.pad(masked, [(0, 0)] * (masked.ndim - 1) + [(prompt_length, 0)])


def complement(masked: Bool[Array, "*V B T"], prompt_length: int) -> Bool[Array, "*V B T"]:
    """Returns the complementary mask: of the completion it masks the clean tokens; the prompt stays clean."""
    return ~masked & (jnp.arange(masked.shape[-1]) >= prompt_length)


def _lowest(values: Array, counts: Array) -> Array:
    """Returns True at the `counts[b]` lowest values of each row `b`; ties go to the lower index."""
    order = jnp.argsort(values, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1, stable=True)
    return rank < counts[:, None]
