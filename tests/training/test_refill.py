"""Groups that teach nothing are replaced by further ones, in a batch of one shape."""

import runpy
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gdsd_jax.config import RefillConfig
from gdsd_jax.methods import Batch, common
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.tasks import TASKS
from gdsd_jax.training.refill import Candidates, further_prompts, refilled, selection
from gdsd_jax.training.rollout import Prompts, Rewarded, reward_metrics

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples/refill.py"))
GROUP, LENGTH, COUNT = 4, 3, 10


def prompts(number: int) -> Prompts:
    rows = TASKS["sudoku"].rows("train", count=number, seed=3)
    return Prompts(np.arange(2 * number).reshape(number, 2), np.ones((number, 2), bool), rows)


def fake_rollout(calls: list[tuple[int, int]]):
    """Completions that are row numbers; every second row of a puzzle that pays earns 1."""

    def roll_out(asked: Prompts, first: int) -> Rewarded:
        calls.append((len(asked.rows), first))
        numbers = np.arange(first, first + len(asked.rows) * GROUP, dtype=np.int32)
        paid = np.repeat([EXAMPLE["pays"](row) for row in asked.rows], GROUP)
        rewards = (paid * (numbers % 2)).astype(np.float32)
        completions = np.repeat(numbers[:, None], LENGTH, axis=1)
        tokens = np.concatenate([np.repeat(asked.tokens, GROUP, axis=0), completions], axis=1)
        batch = Batch(
            jnp.asarray(tokens), None, jnp.ones((len(rewards), LENGTH)), rewards=jnp.asarray(rewards), group_size=GROUP
        )
        return Rewarded(batch, completions, rewards, {"cells": rewards}, {"rollout": 1.0, "reward": 0.5})

    return roll_out


def run(config: RefillConfig):
    calls = []
    found = refilled(config, COUNT, prompts(COUNT + further_prompts(config, COUNT)), fake_rollout(calls))
    return found, calls


def with_gradient(rewarded: Rewarded) -> float:
    """The share of a batch's rows that have an advantage."""
    advantages = common.leave_one_out(rewarded.batch.rewards, GROUP)
    return float(jnp.mean(jnp.abs(advantages) > 0))


def test_updates_of_rows_rise_where_four_groups_of_five_are_flat():
    """A fifth of an update's rows has a gradient without refill, and all of them with it."""
    before, _ = run(RefillConfig())
    assert before.metrics == {} and before.kept is before.sampled and before.prompts == COUNT
    after, calls = run(RefillConfig(rounds=9))
    assert with_gradient(before.kept) <= 0.3 and with_gradient(after.kept) == 1.0
    assert after.kept.batch.tokens.shape == before.kept.batch.tokens.shape
    rounds = len(calls) - 1
    assert 2 <= rounds <= 9 and calls == [(COUNT, n * COUNT * GROUP) for n in range(rounds + 1)]
    rows = (rounds + 1) * COUNT * GROUP
    kept = after.kept.rewards.mean()
    assert after.prompts == (rounds + 1) * COUNT and after.metrics == {
        "refill/rounds": rounds, "refill/rows_sampled": rows, "refill/rows_dropped": rows - COUNT * GROUP,
        "refill/unfilled": 0.0, "refill/reward": kept,
    }  # fmt: skip
    # The host's account of the batch is that of the devices, row by row, and what is logged is all that was sampled.
    np.testing.assert_array_equal(after.kept.batch.rewards, after.kept.rewards)
    np.testing.assert_array_equal(after.kept.batch.tokens[:, 2:], after.kept.completions)
    assert len(after.sampled.rewards) == rows and after.sampled.seconds["rollout"] == rounds + 1
    mean = float(after.sampled.rewards.mean())
    assert reward_metrics(after.sampled)["reward/mean"] == pytest.approx(mean) and mean < kept


def test_finer_rounds_drop_less():
    coarse, _ = run(RefillConfig(rounds=9))
    fine, calls = run(RefillConfig(rounds=90, prompts=1))
    assert with_gradient(fine.kept) == 1.0 and calls[1:] == [(1, (COUNT + n) * GROUP) for n in range(len(calls) - 1)]
    assert fine.metrics["refill/rows_dropped"] <= coarse.metrics["refill/rows_dropped"]


def test_a_budget_that_does_not_suffice_leaves_flat_groups_at_the_end():
    found, calls = run(RefillConfig(rounds=1))
    assert len(calls) == 2
    live = found.kept.rewards.reshape(COUNT, GROUP).std(axis=1) > 0
    assert 0 < live.sum() < COUNT and found.metrics["refill/unfilled"] == pytest.approx(1 - live.mean())
    assert list(live) == sorted(live, reverse=True)


def test_a_selection_of_ones_own():
    rewards = np.array([[0, 0], [0, 1], [0, 3], [2, 2]], np.float32)
    given = Candidates(rewards, {}, np.zeros((4, 2, 1), int), [{}] * 4)
    np.testing.assert_array_equal(selection("spread")(given), [0, 1, 1, 0])
    np.testing.assert_array_equal(EXAMPLE["widest"](given), [0, 0.5, 1.5, 0])


@pytest.mark.parametrize(
    ("name", "message"),
    [("best", "config.refill.select 'best' is not one of spread"), ("no_such:NAME", "cannot be imported"),
     ("math:floor", "'math:floor' failed with TypeError"),
     ("builtins:len", "must return one finite number for each of")],
)  # fmt: skip
def test_a_selection_that_is_none(name, message):
    with pytest.raises(UserError, match=message):
        selection(name)(Candidates(np.zeros((3, 2)), {}, np.zeros((3, 2, 1), int), [{}] * 3))
