"""Groups that teach nothing are replaced by further ones, in a batch of one shape."""

import runpy
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gdsd_jax.config import RefillConfig, TrainConfig, default, freeze
from gdsd_jax.methods import Batch, common
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.tasks import TASKS
from gdsd_jax.training.cursor import Ahead, Cursor, moved, prompts_ahead, remembering, window
from gdsd_jax.training.refill import Candidates, further_prompts, refilled, selection, spread
from gdsd_jax.training.rollout import Prompts, Rewarded, reward_metrics
from gdsd_jax.training.setup import checked_selection

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


# ------------------------------------------------------------------------------------------ prompts that were rejected

ROWS = 100
ORDER = [int(row) for epoch in range(60) for row in np.random.default_rng(epoch).permutation(ROWS)]


def draws(iteration: int, most: int) -> np.ndarray:
    return np.random.default_rng(iteration).random(window(ROWS, most), np.float32)


def iterations(config: RefillConfig, number: int):
    """Runs iterations of selection alone; yields what each did, the row numbers it asked, and the cursor after it."""
    known, most = prompts(ROWS), COUNT + further_prompts(config, COUNT)
    cursor = remembering(Cursor(), ROWS, config)
    for iteration in range(number):
        before = cursor
        ahead = prompts_ahead(cursor, ORDER, most, config, draws(iteration, most) if config.revisit < 1 else None)
        asked = Prompts(known.tokens[ahead.rows], known.mask[ahead.rows], [known.rows[row] for row in ahead.rows])
        found = refilled(config, COUNT, asked, fake_rollout([]))
        cursor, metrics = moved(cursor, ahead, found.prompts, found.worth)
        assert cursor.position - before.position == found.prompts + metrics.get("refill/prompts_skipped", 0)
        yield found, ahead.rows[: found.prompts], cursor


def live_share(config: RefillConfig, number: int, last: int) -> float:
    """The rows with an advantage in the batches of the last iterations, per row that was sampled for them."""
    later = [found for found, _, _ in iterations(config, number)][-last:]
    live = sum(with_gradient(found.kept) * len(found.kept.rewards) for found in later)
    return live / sum(len(found.sampled.rewards) for found in later)


@pytest.mark.parametrize(("rounds", "number", "last"), [(0, 30, 10), (8, 6, 3)])
def test_updates_per_sampled_row_rise_where_rejected_prompts_are_skipped(rounds, number, last):
    """Four of five prompts never pay; the run learns it from their groups, and asks them ever less."""
    share = lambda revisit: live_share(RefillConfig(rounds=rounds, revisit=revisit), number, last)  # noqa: E731
    paying = np.mean([EXAMPLE["pays"](row) for row in prompts(ROWS).rows])
    before = share(1.0)
    assert before == pytest.approx(paying, abs=0.05) and paying <= 0.2
    assert share(0.5) >= 2 * before and share(0.0) == 1.0


def test_without_revisits_of_its_own_a_run_asks_in_the_order_of_its_data():
    plain = [ORDER[position] for position in range(6 * COUNT)]
    asked = [rows for _, rows, _ in iterations(RefillConfig(), 6)]
    assert sum(asked, []) == plain
    *_, (found, _, cursor) = iterations(RefillConfig(rounds=2), 2)
    assert cursor.rejections is None and "refill/prompts_skipped" not in found.metrics


@pytest.mark.parametrize("revisit", [0.0, 0.5])
def test_iterations_end_where_every_prompt_was_rejected(monkeypatch, revisit):
    monkeypatch.setitem(EXAMPLE, "pays", lambda row: False)
    config = RefillConfig(rounds=1, revisit=revisit)
    found = list(iterations(config, 15))
    assert all(len(rows) == 2 * COUNT and outcome.kept.rewards.shape == (COUNT * GROUP,) for outcome, rows, _ in found)
    rejections = found[-1][2].rejections
    assert rejections.sum() == 15 * 2 * COUNT
    # Those with the fewest rejections fill a round, so that all prompts keep their turn.
    assert rejections.max() - rejections.min() <= (1 if revisit == 0 else 5)


def test_a_prompt_returns_with_the_probability_of_its_rejections():
    """After 0 to 3 rejections in succession; a group that is worth an update ends the succession."""
    rows = 4000
    cursor, config = Cursor(0, np.arange(rows, dtype=np.int32) % 4), RefillConfig(revisit=0.5)
    ahead = prompts_ahead(cursor, range(rows), rows, config, np.random.default_rng(0).random(rows))
    drawn = np.array(ahead.rows)[np.array(ahead.ends) < rows] % 4
    np.testing.assert_allclose(np.bincount(drawn) / 1000, [1, 0.5, 0.25, 0.125], atol=0.04)
    some = Ahead([5, 1, 5, 3], [6, 8, 9, 12])
    after, metrics = moved(cursor, some, 4, np.array([False, False, True, False]))
    assert after.position == 12 and metrics == {"refill/prompts_skipped": 8}
    assert [after.rejections[row] for row in (5, 1, 3, 2)] == [0, 2, 4, 2] and cursor.rejections[3] == 3


def test_a_memory_of_another_data_set_is_refused():
    with pytest.raises(UserError, match="remembers rejections of 3 rows, and the training set has 4"):
        remembering(Cursor(0, np.zeros(3, np.int32)), 4, RefillConfig(revisit=0.5))


# ------------------------------------------------------------------------------------------------ before a run begins


def run_with(select: str, **refill) -> TrainConfig:
    run = default("base")
    with run.unlocked():
        run.task.update(name="sudoku", train_rows=3)
        run.update(prompts_per_iteration=4, group_size=2, microbatch_rows=8)
        run.refill.update(select=select, **refill)
    return freeze(TrainConfig, run)


def test_a_selection_is_tried_on_made_up_groups_of_every_size(monkeypatch):
    seen = []

    def mine(candidates):
        assert candidates.rewards.dtype == np.float32 and candidates.completions.shape == (
            *candidates.rewards.shape,
            256,
        )
        assert all(value.shape == candidates.rewards.shape for value in candidates.components.values())
        assert list(candidates.components) == list(TASKS["sudoku"].weights) and "puzzle" in candidates.rows[0]
        seen.append((len(candidates.rows), *candidates.rewards.shape, spread(candidates).tolist()))
        return np.ones(4)

    monkeypatch.setattr("math.mine", mine, raising=False)
    checked_selection(run_with("math:mine"))
    assert seen == []
    checked_selection(run_with("math:mine", revisit=0.5))
    assert seen == [(4, 4, 2, [0, 1, 1, 1])]
    with pytest.raises(UserError, match=r"must return one finite number for each of 2 groups, it returned \(4,\)"):
        checked_selection(run_with("math:mine", rounds=1, prompts=2))
