"""Transfers arrays between the host and the devices, and makes random keys on the devices."""

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
    """Brings results from the devices to the host; training and evaluation bring them back in no other way.

    In a job of several processes, each process gets every array whole.
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
    """Sends arrays that every process holds whole to the devices, and cuts their first axis, the rows, over the mesh.

    Training and evaluation send their inputs in no other way.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.device_put(tree)
    by_rows = lambda x: named_sharding(mesh, ("rows", *["tokens"] * (x.ndim - 1)), x.shape)  # noqa: E731
    return place(tree, jax.tree.map(by_rows, tree))


def seed_key(seed: int) -> jax.Array:
    """Returns the PRNG key of a seed, on every device of the mesh."""
    mesh = jax.sharding.get_mesh()
    return jax.jit(lambda: jax.random.key(seed), out_shardings=None if mesh.empty else replicated(mesh))()


@jax.jit
def checksum(params: Any) -> list[jax.Array]:
    """Returns one number per array, which changes with any of its bits and not with its spread over devices."""

    def one(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32).ravel()
        # The factors are odd and differ, so a change of any value and an exchange of two both show; the sum wraps.
        return jnp.sum(bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)

    return [one(x) for x in jax.tree.leaves(params)]
