"""The KL divergence between the token distributions of two policies that share a head."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from gdsd_jax.denoiser import DenoiserConfig, head_weights, precision_of
from gdsd_jax.diffusion.scoring import DEFAULT_CHUNK, chunk_logits, over_chunks


def divergence(
    config: DenoiserConfig,
    base: Any,
    hidden: Float[Array, "*N D"],
    other: Float[Array, "*N D"],
    *,
    chunk: int = DEFAULT_CHUNK,
) -> Float[Array, "*N"]:
    """Computes `KL(softmax(z) || softmax(z'))` in nats from the hidden states that give the logits `z` and `z'`.

    The KL is `sum_v p_v (z_v - z'_v) - logsumexp(z) + logsumexp(z')`. The sums are accumulated in float32 in one walk
    over chunks of the vocabulary, and rescaled as the maximum of the logits grows. Equal hidden states give exactly 0.

    Args:
      hidden, other: the "hidden" reads of two policies (`gdsd_jax.diffusion.scoring.read_tokens`). On a mesh of several
        devices they must have the axes `[views, rows, tokens, D]`.
      chunk: vocabulary entries whose logits exist at one time.
    """
    precision = precision_of(config)
    shape = hidden.shape[:-1]
    zero, lowest = jnp.zeros(shape, jnp.float32), jnp.full(shape, -jnp.inf, jnp.float32)

    def step(carry: tuple, rows: Array, _: Array) -> tuple:
        (highest, total), (other_highest, other_total), weighted = carry
        z, other_z = (chunk_logits(h, rows, config.dtype, precision) for h in (hidden, other))
        new, weights, kept = _weights(highest, z)
        other_new, other_weights, other_kept = _weights(other_highest, other_z)
        total = kept * total + jnp.sum(weights, axis=-1)
        other_total = other_kept * other_total + jnp.sum(other_weights, axis=-1)
        weighted = kept * weighted + jnp.sum(weights * (z - other_z), axis=-1)
        return (new, total), (other_new, other_total), weighted

    # Both normalisers are accumulated in the same way, so that they are equal for equal logits.
    start = (lowest, zero), (lowest, zero), zero
    sums, other_sums, weighted = over_chunks(step, start, head_weights(config, base), chunk)
    normaliser, other_normaliser = (highest + jnp.log(total) for highest, total in (sums, other_sums))
    return jnp.maximum(weighted / sums[1] - normaliser + other_normaliser, 0.0)


def _weights(highest: Array, z: Array) -> tuple[Array, Array, Array]:
    """Returns the new largest logit, `exp(z - it)`, and the factor that rescales earlier sums from `highest` to it."""
    new = jnp.maximum(highest, jnp.max(z, axis=-1))
    return new, jnp.exp(z - new[..., None]), jnp.exp(highest - new)
