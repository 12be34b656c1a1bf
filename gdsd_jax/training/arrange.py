"""Arranges the rows of a batch on the devices: replicated, or in micro-batches that span all devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gdsd_jax.runtime.sharding import constrain


def replicate(x: jax.Array) -> jax.Array:
    """Replicates a small array before it is resharded, so that each micro-batch spans all devices."""
    return constrain(x, ["tokens"] * x.ndim)


def micro_batches(tree: Any, rows: int, axis: int = 0) -> Any:
    """Cuts every array of a pytree into `B / rows` micro-batches of consecutive rows, along a new first axis.

    Args:
      rows: rows per micro-batch.
      axis: the axis of the rows.
    """

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(replicate(x), axis, 0).reshape(-1, rows, *x.shape[:axis], *x.shape[axis + 1 :])
        x = constrain(x, ("micro_batches", "rows", *["tokens"] * (x.ndim - 2)))
        return jnp.moveaxis(x, 1, 1 + axis)

    return jax.tree.map(cut, tree)
