"""The arithmetic of a block as plain functions of arrays. B rows, T tokens, H heads, K head size, D model size,
S and W positions out of T."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*B D"]:
    """`x / sqrt(mean(x^2) + eps) * scale`, computed in float32, returned in the dtype of `x` (arXiv 1910.07467)."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


def rope_tables(positions: Int[Array, " T"], head_dim: int, theta: float) -> tuple[Array, Array]:
    """Cosine and signed sine, float32 `[T, 2, K/2]`, of the angles `position / theta^(2i/K)` (arXiv 2104.09864)."""
    inverse_frequency = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[:, None] * inverse_frequency
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.stack([cos, cos], axis=1), jnp.stack([-sin, sin], axis=1)


def rotate(x: Float[Array, "B T H K"], tables: tuple[Array, Array]) -> Float[Array, "B T H K"]:
    """Rotates the pairs `(x_i, x_{i + K/2})` by the angles of their position, in float32.

    The tables are those of `rope_tables`, or with a batch axis in front. Reversing the two halves, unlike putting them
    together anew, is an index that the compiler fuses.
    """
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    cos, sin = (table[..., None, :, :] for table in tables)
    return (halves * cos + halves[..., ::-1, :] * sin).astype(x.dtype).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def low_rank(
    x: Float[Array, "*B I"], a: Float[Array, "I R"], b: Float[Array, "R O"], precision: jax.lax.Precision
) -> Float[Array, "*B O"]:
    """`x A B`, with a gradient whose products never transpose anything as wide as the activations."""
    return jnp.dot(jnp.dot(x, a, precision=precision), b, precision=precision)


def _low_rank_forward(x: Array, a: Array, b: Array, precision: jax.lax.Precision) -> tuple[Array, tuple]:
    inner = jnp.dot(x, a, precision=precision)
    return jnp.dot(inner, b, precision=precision), (x, inner, a, b)


def _low_rank_backward(precision: jax.lax.Precision, saved: tuple, g: Array) -> tuple[Array, Array, Array]:
    x, inner, a, b = saved
    over_rows = lambda narrow, wide: jnp.einsum("...r,...o->ro", narrow, wide, precision=precision)  # noqa: E731
    inner_g = jnp.dot(g, b.T, precision=precision)
    return jnp.dot(inner_g, a.T, precision=precision), over_rows(inner_g, x).T, over_rows(inner, g)


low_rank.defvjp(_low_rank_forward, _low_rank_backward)


def attention(
    query: Float[Array, "B S H K"],
    key: Float[Array, "B T kv K"],
    value: Float[Array, "B T kv K"],
    real: Bool[Array, "#B T"] | None,
    precision: jax.lax.Precision,
    cached: tuple[Float[Array, "B kv C K"], Float[Array, "B kv C K"], Bool[Array, "#B C"]] | None = None,
) -> Float[Array, "B S H K"]:
    """Full (bidirectional) attention of S queries over the T real tokens; the softmax is float32.

    `real` is False on pads: no token attends to them. What pad queries themselves compute is never read.
    Each key/value head serves `H / kv` consecutive query heads. `cached` adds keys and values, and which of them are
    seen; they are read where they lie, never copied.
    """
    b, s, h, k = query.shape
    grouped = query.reshape(b, s, key.shape[2], h // key.shape[2], k)
    parts = [(key.swapaxes(1, 2), value.swapaxes(1, 2), real)] + ([] if cached is None else [cached])

    def score(key: Array, seen: Array | None) -> Array:
        scores = jnp.einsum("bsngk,bntk->bngst", grouped, key, precision=precision, preferred_element_type=jnp.float32)
        scores = scores * (k**-0.5)
        return scores if seen is None else jnp.where(seen[:, None, None, None, :], scores, jnp.finfo(jnp.float32).min)

    scores = jnp.concatenate([score(key, seen) for key, _, seen in parts], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    weights = jnp.split(weights, [key.shape[1]], axis=-1) if len(parts) > 1 else [weights]
    mixed = sum(
        jnp.einsum("bngst,bntk->bsngk", part, value, precision=precision)
        for part, (_, value, _) in zip(weights, parts, strict=True)
    )
    return mixed.reshape(b, s, h, k)
