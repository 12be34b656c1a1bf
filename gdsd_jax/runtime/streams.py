"""Streams of random numbers: every draw of a run takes its key from here, and no two draws take the same key.

A key is the key of the seed, folded with a stream and then with a count (of updates, iterations or batches). A draw may
split its key further; the keys of different streams or counts never coincide.
"""

from __future__ import annotations

import enum

import jax
from jaxtyping import Array, Int

from gdsd_jax.runtime.transfer import seed_key


class Stream(enum.IntEnum):
    """The kinds of draws; the comment on each says what its count counts."""

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
    SFT_HELD_OUT = 11  # one, folded with the first row of a batch
    PARTS = 10  # passes over rollouts
    REVISITS = 12  # iterations


def stream_key(key: Array, stream: Stream, count: int | Int[Array, ""] = 0) -> Array:
    """Returns the key of one draw of a run; `key` is the key of the run's seed."""
    return jax.random.fold_in(jax.random.fold_in(key, int(stream)), count)


def stream_of_seed(seed: int, stream: Stream) -> Array:
    """Returns the first key of a stream, on every device of the mesh."""
    return jax.jit(stream_key, static_argnums=1)(seed_key(seed), stream)
