"""The divergence of two policies with one head at the same states, summed over the whole vocabulary."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gdsd_jax.denoiser import DenoiserConfig, head_weights
from gdsd_jax.diffusion.scoring import DEFAULT_CHUNK, chunk_logits, over_chunks


def divergence(
    config: DenoiserConfig,
    base: Any,
    hidden: Float[Array, "*N D"],
    other: Float[Array, "*N D"],
    *,
    chunk: int = DEFAULT_CHUNK,
) -> Float[Array, "*N"]:
    """Computes `KL(softmax(z) || softmax(z'))` in nats, float32, of the logits of two hidden states.

    It is `sum_v p_v (z_v - z'_v) - logsumexp(z) + logsumexp(z')`, accumulated in one walk over chunks of the vocabulary
    and rescaled as the maximum of `z` grows. Equal hidden states give exactly 0.

    Args:
      hidden, other: the "hidden" reads of two policies (`gdsd_jax.diffusion.scoring.read_tokens`); on a mesh of several
        devices `[views, rows, tokens, D]`, as reads are.
      chunk: vocabulary entries whose logits exist at one time.
    """
    precision = jax.lax.Precision.HIGHEST if config.dtype == "float32" else None
    shape = hidden.shape[:-1]
    zero, lowest = jnp.zeros(shape, jnp.float32), jnp.full(shape, -jnp.inf, jnp.float32)

    def step(carry: tuple, rows: Array, _: Array) -> tuple:
        highest, total, weighted, other_normaliser = carry
        z, other_z = (chunk_logits(h, rows, config.dtype, precision) for h in (hidden, other))
        new = jnp.maximum(highest, jnp.max(z, axis=-1))
        weights, kept = jnp.exp(z - new[..., None]), jnp.exp(highest - new)
        total = kept * total + jnp.sum(weights, axis=-1)
        weighted = kept * weighted + jnp.sum(weights * (z - other_z), axis=-1)
        top = jnp.max(other_z, axis=-1)
        sum_here = top + jnp.log(jnp.sum(jnp.exp(other_z - top[..., None]), axis=-1))
        return new, total, weighted, jnp.logaddexp(other_normaliser, sum_here)

    carry = over_chunks(step, (lowest, zero, zero, lowest), head_weights(config, base), chunk)
    highest, total, weighted, other_normaliser = carry
    return jnp.maximum(weighted / total - (highest + jnp.log(total)) + other_normaliser, 0.0)
