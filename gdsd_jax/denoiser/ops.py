"""The arithmetic of a block as plain functions of arrays. B rows, T tokens, H heads, K head size, D model size."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*B D"]:
    """`x / sqrt(mean(x^2) + eps) * scale`, computed in float32, returned in the dtype of `x` (arXiv 1910.07467)."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


def rope_angles(positions: Int[Array, " T"], head_dim: int, theta: float) -> Float[Array, "T half"]:
    """Rotation angles `position / theta^(2i/K)` in float32 (arXiv 2104.09864)."""
    inverse_frequency = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    return positions.astype(jnp.float32)[:, None] * inverse_frequency


def rotate(x: Float[Array, "B T H K"], angles: Float[Array, "T half"]) -> Float[Array, "B T H K"]:
    """Rotates the pairs `(x_i, x_{i + K/2})` by the angles of their position, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B T kv K"],
    value: Float[Array, "B T kv K"],
    real: Bool[Array, "B T"] | None,
    precision: jax.lax.Precision,
) -> Float[Array, "B T H K"]:
    """Full (bidirectional) attention over the real tokens; the softmax is float32.

    `real` is False on pads: no token attends to them. What pad queries themselves compute is never read.
    Each key/value head serves `H / kv` consecutive query heads.
    """
    b, t, h, k = query.shape
    grouped = query.reshape(b, t, key.shape[2], h // key.shape[2], k)
    scores = jnp.einsum("btngk,bsnk->bngts", grouped, key, precision=precision, preferred_element_type=jnp.float32)
    scores = scores * (k**-0.5)
    if real is not None:
        scores = jnp.where(real[:, None, None, None, :], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bngts,bsnk->btngk", weights, value, precision=precision).reshape(b, t, h, k)
