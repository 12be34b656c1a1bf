"""Streams of random numbers: every draw of the project takes its key from here, and no two draws take the same.

A key is that of the seed, folded with a stream and then with a count (of updates, iterations, batches). What a draw
splits its key into stays below it, so that keys of different streams or counts never meet.
"""

from __future__ import annotations

import enum

import jax
from jaxtyping import Array, Int

from gdsd_jax.runtime.transfer import seed_key


class Stream(enum.IntEnum):
    """What is drawn, and what its count counts."""

    ROLLOUT = 0  # iterations
    MASKS = 1  # updates
    DROPOUT = 2  # updates
    OLD_MASKS = 3  # iterations
    ADAPTER = 4  # one
    EXTRAS = 5  # one
    EVALUATION = 6  # one, split over batches
    GENERATION = 7  # batches
    SFT_MASKS = 8  # updates
    SFT_DROPOUT = 9  # updates


def stream_key(key: Array, stream: Stream, count: int | Int[Array, ""] = 0) -> Array:
    """Returns the key of one draw of a run whose seed's key is `key`."""
    return jax.random.fold_in(jax.random.fold_in(key, int(stream)), count)


def stream_of_seed(seed: int, stream: Stream) -> Array:
    """Returns the first key of a stream, on every device of the mesh."""
    return jax.jit(stream_key, static_argnums=1)(seed_key(seed), stream)
