"""The steps between the updates of a run: choosing rows, adapting the weight of the KL, moving the reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gdsd_jax.config import ReferenceConfig
from gdsd_jax.methods import Batch
from gdsd_jax.runtime.sharding import constrain
from gdsd_jax.runtime.streams import Stream, stream_key
from gdsd_jax.training.state import TrainState

# The largest relative error of the KL that counts; an update changes the weight by at most this share times `kl_rate`
# (arXiv 1909.08593, section 2.2).
LARGEST_ERROR = 0.2


def part_of(key: jax.Array, batch: Batch, rows: int, inner_updates: int) -> Batch:
    """Returns the part of a rollout that one update uses: whole groups, in an order drawn for each pass over it.

    Args:
      key: the run's key.
      batch: the rollout, with `iteration` and `inner_update`.
      rows: number of rows of the part.
      inner_updates: updates on each rollout.
    """
    size, total = batch.group_size, batch.tokens.shape[0]
    parts, groups = total // rows, rows // size
    passes = -(-inner_updates // parts)
    this_pass = batch.iteration * passes + batch.inner_update // parts
    order = jax.random.permutation(stream_key(key, Stream.PARTS, this_pass), total // size)
    chosen = jax.lax.dynamic_slice_in_dim(order, batch.inner_update % parts * groups, groups)
    places = (chosen[:, None] * size + jnp.arange(size)).reshape(-1)

    def take(x: jax.Array) -> jax.Array:
        found = jnp.take(x, places, axis=0)
        return constrain(found, ("rows", *["tokens"] * (found.ndim - 1)))

    counters = {"iteration": batch.iteration, "inner_update": batch.inner_update}
    return jax.tree.map(take, batch.replace(iteration=None, inner_update=None)).replace(**counters)


def adapted_scale(scale: jax.Array, kl: jax.Array, settings: ReferenceConfig) -> jax.Array:
    """Returns the weight of the KL after an update that measured `kl`; it grows while `kl` is above the target."""
    error = jnp.clip(kl / settings.kl_target - 1, -LARGEST_ERROR, LARGEST_ERROR)
    return scale * (1 + settings.kl_rate * error)


def after_iteration(state: TrainState, settings: ReferenceConfig) -> TrainState:
    """Returns the state after an iteration's last update: counts the iteration, and moves the reference when due.

    The reference moves every `settings.every` iterations, to `decay * reference + (1 - decay) * policy`.
    """
    state = state.replace(iteration=state.iteration + 1)
    if state.reference is None:
        return state
    due, keep = state.iteration % settings.every == 0, settings.decay
    move = lambda old, new: jnp.where(due, keep * old + (1 - keep) * new, old)  # noqa: E731
    return state.replace(reference=jax.tree.map(move, state.reference, state.params))
