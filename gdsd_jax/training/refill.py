"""Replaces groups that teach nothing, between reward and update, by groups of further prompts.

If all completions of a group earn the same, their advantages are 0 and its rows only dilute an update (dynamic
sampling: DAPO, arXiv 2503.14476). Further prompts are sampled in rounds until enough groups are worth an update, or
`config.refill.rounds` rounds are done. The function `config.refill.select` decides which groups are worth an update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdsd_jax.config import RefillConfig
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.plugins import is_plugin, load_plugin
from gdsd_jax.runtime.sharding import constrain
from gdsd_jax.runtime.transfer import put
from gdsd_jax.tasks.task import weighted_sum
from gdsd_jax.training.rollout import Prompts, Rewarded


class Candidates(NamedTuple):
    """The groups among which a selection chooses: N groups of G completions of L tokens.

    rewards: `[N, G]` float32, the weighted sums of the components.
    components: the task's reward components by name, `[N, G]` float32 each; NaN where one failed.
    completions: `[N, G, L]` token ids.
    rows: the N rows of the task that the groups answer.
    """

    rewards: np.ndarray
    components: dict[str, np.ndarray]
    completions: np.ndarray
    rows: list[dict]


def spread(candidates: Candidates) -> np.ndarray:
    """Returns for each group 1 if its rewards differ, else 0."""
    return (candidates.rewards.std(axis=1) >= 1e-6).astype(np.float32)


SELECTIONS: dict[str, Callable[[Candidates], Sequence[float] | np.ndarray]] = {"spread": spread}


def selection(name: str) -> Callable[[Candidates], np.ndarray]:
    """Returns the selection of that name, or a user's `package.module:NAME`, with a check of its results.

    Raises:
      UserError: the name is unknown or cannot be imported.
    """
    if not is_plugin(name) and name not in SELECTIONS:
        names = ", ".join(SELECTIONS)
        raise UserError(f"config.refill.select {name!r} is not one of {names}, and not package.module:NAME")
    chosen = SELECTIONS[name] if name in SELECTIONS else load_plugin(name, "config.refill.select")

    def checked(candidates: Candidates) -> np.ndarray:
        groups = len(candidates.rewards)
        try:
            values = np.asarray(chosen(candidates), np.float32)
        except (Exception, SystemExit) as error:  # a user's function may raise anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise UserError(f"config.refill.select {name!r} failed with {reason}") from error
        if values.shape != (groups,) or not np.isfinite(values).all():
            raise UserError(
                f"config.refill.select {name!r} must return one finite number for each of {groups} groups, "
                f"it returned {values.shape} with {np.isfinite(values).sum()} finite"
            )
        return values

    return checked


def made_up(rows: list[dict], weights: Mapping[str, float], size: int, length: int) -> Candidates:
    """Returns groups as a rollout of these rows makes them: the rewards of the first are equal, of others they differ.

    Args:
      weights: those of the task's reward components, by name.
      size: G, completions of a group.
      length: L, tokens of a completion.
    """
    scores = np.arange(len(rows), dtype=np.float32)[:, None] * np.linspace(0, 1, size, dtype=np.float32)
    components = {name: scores / len(rows) for name in weights}
    completions = np.zeros((len(rows), size, length), np.int32)
    return Candidates(weighted_sum(components, weights), components, completions, rows)


class Refilled(NamedTuple):
    """The outcome of an iteration's rollouts.

    kept: the completions for the update, of the shape of one rollout.
    sampled: all completions that were sampled; its `batch` is that of `kept`.
    prompts: number of prompts that were used.
    worth: `[prompts]` bool, whether the group of each of them was worth an update; None if refill is off.
    metrics: how much was sampled and dropped; empty if refill is off.
    """

    kept: Rewarded
    sampled: Rewarded
    prompts: int
    worth: np.ndarray | None
    metrics: dict[str, float]


def further_prompts(config: RefillConfig, count: int) -> int:
    """Returns the number of prompts that an iteration may need beyond the first `count`."""
    return config.rounds * (config.prompts or count)


def refilled(
    config: RefillConfig, count: int, asked: Prompts, roll_out: Callable[[Prompts, int], Rewarded]
) -> Refilled:
    """Samples `count` groups, and further ones in place of those that the selection rejects.

    Args:
      asked: the iteration's prompts: `count` for the first round, followed by all that further rounds may need.
      roll_out: `(prompts, number of the first row) -> Rewarded`; the number makes the draws of the rounds differ.
    """
    kept = roll_out(asked.part(0, count), 0)
    if not config.selects:
        return Refilled(kept, kept, count, None, {})
    select, size = selection(config.select), kept.batch.group_size
    sampled, used, rows = kept, count, asked.rows[:count]
    values = select(candidates(kept, rows))
    worth = values > 0
    rounds = 0
    while rounds < config.rounds and (values > 0).sum() < count:
        end = used + (config.prompts or count)
        new, new_rows = roll_out(asked.part(used, end), used * size), asked.rows[used:end]
        new_values = select(candidates(new, new_rows))
        values, worth = np.concatenate([values, new_values]), np.concatenate([worth, new_values > 0])
        sampled = joined(sampled, new)
        chosen = np.argsort(-values, kind="stable")[:count]
        kept, values = merged(kept, new, chosen), values[chosen]
        used, rounds = end, rounds + 1
    metrics = {
        "refill/rounds": float(rounds),
        "refill/rows_sampled": float(used * size),
        "refill/rows_dropped": float((used - count) * size),
        "refill/unfilled": float((values <= 0).mean()),
        "refill/reward": float(kept.rewards.mean()),
    }
    return Refilled(kept, sampled._replace(batch=kept.batch), used, worth, metrics)


def candidates(rewarded: Rewarded, rows: list[dict]) -> Candidates:
    """Returns the groups of a rollout as selections take them."""
    by_group = lambda x: x.reshape(len(rows), -1, *x.shape[1:])  # noqa: E731
    components = {name: by_group(value) for name, value in rewarded.components.items()}
    return Candidates(by_group(rewarded.rewards), components, by_group(rewarded.completions), rows)


def joined(first: Rewarded, second: Rewarded) -> Rewarded:
    """Joins the fields of two rollouts that are on the host; the batch is that of the first."""
    both = lambda a, b: np.concatenate([a, b])  # noqa: E731
    return Rewarded(
        first.batch,
        both(first.completions, second.completions),
        both(first.rewards, second.rewards),
        {name: both(value, second.components[name]) for name, value in first.components.items()},
        {name: value + second.seconds[name] for name, value in first.seconds.items()},
    )


def merged(first: Rewarded, second: Rewarded, groups: np.ndarray) -> Rewarded:
    """Returns the chosen groups of two rollouts; the groups of the second are numbered after those of the first."""
    size = first.batch.group_size
    rows = (groups[:, None] * size + np.arange(size)).reshape(-1).astype(np.int32)
    both = joined(first, second)
    return both._replace(
        batch=_taken(first.batch, second.batch, put(rows)),
        completions=both.completions[rows],
        rewards=both.rewards[rows],
        components={name: value[rows] for name, value in both.components.items()},
    )


@jax.jit
def _taken(first: Any, second: Any, rows: jax.Array) -> Any:
    """Takes rows of two batches, numbered as in `merged`, and spreads them over the mesh."""

    def take(a: jax.Array, b: jax.Array) -> jax.Array:
        found = jnp.take(jnp.concatenate([a, b]), rows, axis=0)
        return constrain(found, ("rows", *["tokens"] * (found.ndim - 1)))

    return jax.tree.map(take, first, second)
