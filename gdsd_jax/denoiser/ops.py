"""The arithmetic of a layer as plain functions of arrays.

B rows, T tokens, S queries, C cached tokens, H query heads, kv key/value heads, K head size, D model size, F MLP size,
I inputs and O outputs of a matrix, R rank of an adapter.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Int8


def sum_of_products(x: Float[Array, "*B N"], y: Float[Array, "*B N"]) -> Float[Array, "*B"]:
    """Computes `sum(x * y)` over the last axis.

    On a CPU this is a dot product, which XLA computes forty times faster than the sum of products.
    """
    return jax.lax.platform_dependent(
        x, y,
        cpu=functools.partial(jnp.einsum, "...n,...n->...", precision=jax.lax.Precision.HIGHEST),
        default=lambda x, y: jnp.sum(x * y, axis=-1),
    )  # fmt: skip


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*B D"]:
    """Computes `x / sqrt(mean(x^2) + eps) * scale` in float32; returns it in the dtype of `x` (arXiv 1910.07467)."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


def gated(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """Computes `silu(gate) * up`, the input of SwiGLU's last matrix (arXiv 2002.05202)."""
    return jax.nn.silu(gate) * up


def rope_tables(positions: Int[Array, " T"], head_dim: int, theta: float) -> tuple[Array, Array]:
    """Returns cosine and signed sine of the angles `position / theta^(2i/K)`, each float32 `[T, 2, K/2]`.

    Source: arXiv 2104.09864.
    """
    inverse_frequency = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[:, None] * inverse_frequency
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.stack([cos, cos], axis=1), jnp.stack([-sin, sin], axis=1)


def rotate(x: Float[Array, "B T H K"], tables: tuple[Array, Array]) -> Float[Array, "B T H K"]:
    """Rotates the pairs `(x_i, x_{i + K/2})` by the angles of their positions, in float32.

    The tables are those of `rope_tables`, optionally with a batch axis in front. Reversed indexing swaps the halves,
    because the compiler fuses it, unlike a concatenation.
    """
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    cos, sin = (table[..., None, :, :] for table in tables)
    return (halves * cos + halves[..., ::-1, :] * sin).astype(x.dtype).reshape(x.shape)


def over_rows(x: Float[Array, "*B M"], y: Float[Array, "*B N"], precision: jax.lax.Precision) -> Float[Array, "M N"]:
    """Computes `x^T y`, summed over all leading axes, in float32.

    Where rows are split over devices, the devices' partial sums are added in float32 too.
    """
    summed = functools.partial(jnp.einsum, "...m,...n->mn", precision=precision, preferred_element_type=jnp.float32)
    # On a CPU, XLA lacks this product of bfloat16 for some layouts, and would widen the factors anyway.
    return jax.lax.platform_dependent(
        x, y, cpu=lambda x, y: summed(x.astype(jnp.float32), y.astype(jnp.float32)), default=summed
    )


def product(
    x: Float[Array, "*B I"], w: Float[Array, "O I"], precision: jax.lax.Precision, dtype: Any = None
) -> Float[Array, "*B O"]:
    """Computes `x W^T`, in the dtype of `x` or another one."""
    return jnp.einsum("...i,oi->...o", x, w, precision=precision, preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def product_plus(
    x: Float[Array, "*B I"],
    w: Float[Array, "O I"] | tuple[Int8[Array, "O I"], Float[Array, " O"]],
    addends: tuple[Array, ...],
    precision: jax.lax.Precision,
) -> Float[Array, "*B O"]:
    """Computes `x W^T` plus the addends (broadcast to its shape), summed in float32, rounded once to the dtype of `x`.

    A matrix in 8 bits comes with the scales of its output channels, which multiply the float32 product; it gets no
    gradient.

    If `x W^T` were rounded first, bfloat16 would lose every addend below half a unit in the last place of `x W^T`, and
    an adapter early in its training would change nothing. A sum that is rounded once keeps such an addend on average.
    The addends have the dtype of `x`, so that a GPU adds them inside the float32 product. Gradients have the dtype of
    `x`.
    """
    matrix, scale = w if isinstance(w, tuple) else (w, None)
    y = product(x, matrix.astype(x.dtype), precision, jnp.float32)
    y = y if scale is None else y * scale
    return sum((addend.astype(jnp.float32) for addend in addends), y).astype(x.dtype)


def _product_plus_forward(x: Array, w: Any, addends: tuple, precision: jax.lax.Precision) -> tuple[Array, tuple]:
    # The backward pass needs only an addend's number of axes. A small bias is kept to show it, a full array is not.
    return product_plus(x, w, addends, precision), (x, w, [None if a.ndim == x.ndim else a for a in addends])


def _product_plus_backward(precision: jax.lax.Precision, saved: tuple, g: Array) -> tuple[Array, Any, tuple]:
    x, w, biases = saved
    of_addends = tuple(g if bias is None else jnp.sum(g, axis=tuple(range(g.ndim - bias.ndim))) for bias in biases)
    if isinstance(w, tuple):
        matrix, scale = w
        scaled = (g.astype(jnp.float32) * scale).astype(g.dtype)
        frozen = np.zeros(matrix.shape, jax.dtypes.float0), jnp.zeros_like(scale)
        return jnp.dot(scaled, matrix.astype(g.dtype), precision=precision), frozen, of_addends
    of_w = over_rows(g, x, precision).astype(w.dtype)
    return jnp.dot(g, w, precision=precision), of_w, of_addends


product_plus.defvjp(_product_plus_forward, _product_plus_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def low_rank(
    x: Float[Array, "*B I"], a: Float[Array, "I R"], b: Float[Array, "R O"], precision: jax.lax.Precision
) -> Float[Array, "*B O"]:
    """Computes `x A B`; its gradient never transposes an array as wide as the activations."""
    return jnp.dot(jnp.dot(x, a, precision=precision), b, precision=precision)


def _low_rank_forward(x: Array, a: Array, b: Array, precision: jax.lax.Precision) -> tuple[Array, tuple]:
    inner = checkpoint_name(jnp.dot(x, a, precision=precision), "product")
    return jnp.dot(inner, b, precision=precision), (x, inner, a, b)


def _low_rank_backward(precision: jax.lax.Precision, saved: tuple, g: Array) -> tuple[Array, Array, Array]:
    x, inner, a, b = saved
    inner_g = jnp.dot(g, b.T, precision=precision)
    of_a, of_b = over_rows(inner_g, x, precision).T.astype(a.dtype), over_rows(inner, g, precision).astype(b.dtype)
    return jnp.dot(inner_g, a.T, precision=precision), of_a, of_b


low_rank.defvjp(_low_rank_forward, _low_rank_backward)


def attention(
    query: Float[Array, "B S H K"],
    key: Float[Array, "B T kv K"],
    value: Float[Array, "B T kv K"],
    real: Bool[Array, "#B T"] | None,
    precision: jax.lax.Precision,
    cached: tuple[Float[Array, "B kv K C"], Float[Array, "B kv C K"], Bool[Array, "#B C"] | None] | None = None,
    allowed: Bool[Array, "#B S T"] | None = None,
) -> Float[Array, "B S H K"]:
    """Computes the attention of S queries to T tokens and to cached ones; scores and softmax are float32.

    Each key/value head serves `H / kv` consecutive query heads. The outputs at pad queries are never read.

    Args:
      real: False on pads, to which no query attends; None: all tokens are real.
      cached: further keys and values, and a mask of those that are attended to (None: all). They are read in place,
        never copied.
      allowed: the tokens that each query may attend to; None: all.
    """
    b, s, h, k = query.shape
    kv = key.shape[2]
    # Every product below is one of plain matrices, rows times columns, for each batch row and key/value head.
    grouped = query.reshape(b, s, kv, h // kv, k).transpose(0, 2, 3, 1, 4).reshape(b, kv, -1, k)
    parts = [(key.transpose(0, 2, 3, 1), value.swapaxes(1, 2), real)] + ([] if cached is None else [cached])

    lowest = jnp.finfo(jnp.float32).min

    def score(key: Array, seen: Array | None) -> Array:
        scores = jnp.einsum("bnsk,bnkt->bnst", grouped, key, precision=precision, preferred_element_type=jnp.float32)
        return scores if seen is None else jnp.where(seen[:, None, None], scores, lowest)

    def mix(weights: Array, value: Array) -> Array:
        return jnp.einsum(
            "bnst,bntk->bnsk", weights.astype(value.dtype), value,
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip

    scores = [score(key, seen) for key, _, seen in parts]
    if allowed is not None:
        by_head = scores[0].reshape(b, kv, h // kv, s, -1)
        scores[0] = jnp.where(allowed[:, None, None], by_head, lowest).reshape(scores[0].shape)
    highest = [jnp.max(jax.lax.stop_gradient(part), axis=-1, keepdims=True) for part in scores]
    weights = [jnp.exp((part - functools.reduce(jnp.maximum, highest)) * k**-0.5) for part in scores]
    total = sum(jnp.sum(part, axis=-1, keepdims=True) for part in weights)
    mixed = sum(mix(part, value) for part, (_, value, _) in zip(weights, parts, strict=True)) / total
    mixed = mixed.astype(query.dtype).reshape(b, kv, h // kv, s, k).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(b, s, h, k)
