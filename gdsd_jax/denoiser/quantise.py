"""Weights in 8 bits: the frozen matrices of the layers as int8, with one float32 scale for each output channel.

    W[o, i] ~ scale[o] * q[o, i],    scale[o] = max_i |W[o, i]| / 127

Each entry is off by at most half a scale. The scales multiply the product, not the matrix: `x W^T ~ (x q^T) * scale`,
as in LLM.int8() (arXiv 2208.07339), except that activations are not rounded. Norms, biases, embedding, head and
adapters keep their dtypes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

LARGEST = 127


def quantise(weight: Float[Array, "*N O I"]) -> tuple[Int8[Array, "*N O I"], Float[Array, "*N O"]]:
    """Rounds matrices to int8, and returns them with the float32 scales of their output channels."""
    wide = weight.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1) / LARGEST
    # A channel of zeros has the scale 0, and is divided by 1 instead.
    rounded = jnp.round(wide / jnp.where(scale > 0, scale, 1.0)[..., None])
    return jnp.clip(rounded, -LARGEST, LARGEST).astype(jnp.int8), scale


def quantised(base: Any) -> Any:
    """Returns a copy of a base in which the matrices of the layers are int8, each with a `scale` beside it."""

    def one(module: Any) -> Any:
        if not (isinstance(module, dict) and "weight" in module):
            return module
        weight, scale = quantise(module["weight"])
        return module | {"weight": weight, "scale": scale}

    return base | {"layers": {name: one(module) for name, module in base["layers"].items()}}


@jax.jit
def quantise_layers(weights: Float[Array, "N O I"]) -> tuple[Int8[Array, "N O I"], Float[Array, "N O"]]:
    """Rounds stacked matrices one layer at a time, so that a float32 copy of only one layer exists."""
    return jax.lax.map(quantise, weights)
