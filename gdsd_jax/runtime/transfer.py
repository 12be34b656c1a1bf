"""Transfers between the host and the devices, and the keys that start there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gdsd_jax.runtime import hosts
from gdsd_jax.runtime.sharding import named_sharding, place, replicated


def fetch(tree: Any) -> Any:
    """The only way from device to host: training and evaluation bring back results through here and nowhere else.

    In a job of several processes each gets the whole of every array.
    """
    if hosts.several():
        tree = _everywhere(jax.sharding.get_mesh())(tree)
    result = jax.device_get(tree)
    hosts.progressed()
    return result


@functools.cache
def _everywhere(mesh: Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def put(tree: Any) -> Any:
    """The only way from host to device: arrays with rows in front, whole in every process, are cut over the mesh."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.device_put(tree)
    by_rows = lambda x: named_sharding(mesh, ("rows", *["tokens"] * (x.ndim - 1)), x.shape)  # noqa: E731
    return place(tree, jax.tree.map(by_rows, tree))


def seed_key(seed: int) -> jax.Array:
    """The PRNG key of a seed, on every device of the mesh."""
    mesh = jax.sharding.get_mesh()
    return jax.jit(lambda: jax.random.key(seed), out_shardings=None if mesh.empty else replicated(mesh))()


@jax.jit
def checksum(params: Any) -> list[jax.Array]:
    """One number per array that changes with any of its bits; exact however the array is spread over devices."""

    def one(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32).ravel()
        # Odd factors, so that a change anywhere and an exchange of two values both show; the sum wraps around.
        return jnp.sum(bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)

    return [one(x) for x in jax.tree.leaves(params)]
