"""Rollouts: where completions end, rewards that no update may use, parts judged while others are sampled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdsd_jax.diffusion import Rollout, SamplerConfig
from gdsd_jax.evaluation import completions
from gdsd_jax.evaluation.completions import Completed, judge_by_all
from gdsd_jax.hub.published import LLADA_8B
from gdsd_jax.hub.tokenizer import Tokenizer
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.tasks import TASKS
from gdsd_jax.tasks.task import regraded, require_finite
from gdsd_jax.training import rollout
from gdsd_jax.training.rollout import Prompts, RolloutSpec, completion_mask, roll_out


def test_a_completion_ends_with_the_first_of_several_ids():
    completions = np.array([[3, 7, 3, 9], [3, 3, 3, 3], [9, 7, 3, 3]])
    np.testing.assert_array_equal(completion_mask(completions, (9, 7)), [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    np.testing.assert_array_equal(completion_mask(completions, 9), [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]])


def test_an_infinite_metric_is_named():
    task = dataclasses.replace(TASKS["gsm8k"], measure=lambda completion, row: {"accuracy": float(completion)})
    task = dataclasses.replace(task, graders={})
    assert judge_by_all(task, [{}] * 2, [Completed(["1", "nan"], None)])["accuracy"].tolist() == [1.0, 0.0]
    with pytest.raises(UserError, match="the metric accuracy of the task gsm8k is inf for 1 of 2 .* task's measure"):
        judge_by_all(task, [{}] * 2, [Completed(["1", "inf"], None)])


def test_an_infinite_reward_is_named():
    task = dataclasses.replace(TASKS["gsm8k"], score=lambda completion, row: {"correct": float(completion)})
    finite = task.rewards(["1", "nan"], [{"answer": "1"}] * 2)
    require_finite(finite, task, "reward")
    with pytest.raises(UserError, match="the reward correct of the task gsm8k is inf for 1 of 2 completions"):
        require_finite(task.rewards(["1", "inf"], [{"answer": "1"}] * 2), task, "reward")


def test_an_evaluation_shows_what_each_grader_says():
    rows = [{"answer": "18"}] * 3
    texts = ["\\boxed{18}", "<answer>20-18</answer>", "#### 18 eggs in 2 days"]
    batches = [Completed(texts[:2], [0.5, 1.0]), Completed(texts[2:], [0.0])]
    values = judge_by_all(TASKS["gsm8k"], rows, batches)
    assert list(values) == ["accuracy", "accuracy (public)", "kl"]
    np.testing.assert_array_equal(values["accuracy"], [1, 0, 1])
    np.testing.assert_array_equal(values["accuracy (public)"], [1, 0, 0])
    values = judge_by_all(regraded(TASKS["gsm8k"], "public"), rows, batches)
    np.testing.assert_array_equal(values["accuracy (robust)"], [1, 0, 1])
    grid = [{"puzzle": "0" * 16, "solution": "1" * 16}]
    assert list(judge_by_all(TASKS["sudoku"], grid, [Completed([""], None)])) == ["cells", "puzzles"]


def test_a_part_is_rewarded_while_the_next_one_is_sampled(monkeypatch):
    """The devices receive the next part before rewards begin, and the batch is that of a rollout in one part."""
    events = []

    def sample(config, base, lora, tokens, mask, key, sampler, numbers):
        events.append("sample")
        completions = numbers[:, None] + jnp.arange(3)
        own = numbers[:, None] * jnp.ones((1, 3), jnp.int32)
        return Rollout(jnp.concatenate([tokens, completions], axis=1), own, own * 0.5)

    def score(completion, row):
        events.append("reward")
        return {"cells_correct": float(completion)}

    monkeypatch.setattr(rollout, "sample", sample)
    task = dataclasses.replace(TASKS["sudoku"], score=score)
    monkeypatch.setattr(Tokenizer, "__init__", lambda self: None)
    monkeypatch.setattr(Tokenizer, "decode", lambda self, completions: [str(row[0]) for row in completions])
    sampler = SamplerConfig(3, 3, 3, "low_confidence")
    prompts = Prompts(np.arange(6, dtype=np.int32).reshape(3, 2), np.ones((3, 2), bool), [{}] * 3)

    def run(part_rows):
        events.clear()
        spec = RolloutSpec(LLADA_8B, sampler, task, Tokenizer(), group_size=2, part_rows=part_rows)
        return roll_out(spec, None, None, jax.random.key(0), prompts)

    def measure(text, row):
        return {"even": 1 - int(text) % 2, "small": int(text) < 3}

    judged = dataclasses.replace(task, measure=measure, metrics_named=("even", "small"))
    spec = RolloutSpec(LLADA_8B, sampler, judged, Tokenizer(), group_size=2)
    found = roll_out(spec._replace(part_rows=2, verdicts=True), None, None, jax.random.key(0), prompts)
    assert found.batch.verdict_names == ("even", "small") and set(found.components) == {"cells_correct"}
    np.testing.assert_array_equal(found.batch.verdicts, [[1, 1], [0, 1], [1, 1], [0, 0], [1, 0], [0, 0]])
    later = roll_out(spec, None, None, jax.random.key(0), prompts, first_row=100)
    assert later.batch.verdicts is None and later.rewards[0] == 100

    whole = run(None)
    assert events == ["sample"] + ["reward"] * 6
    np.testing.assert_array_equal(whole.rewards, range(6))
    parts = run(2)
    assert events == ["sample", "sample", *["reward"] * 2, "sample", *["reward"] * 4]
    for found, expected in zip(*map(jax.tree.leaves, (parts[:-1], whole[:-1])), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_batch_is_judged_while_the_next_one_is_sampled(monkeypatch):
    """Parts have one shape, each row its own number, and the devices hold the next part before a result is read."""
    events = []

    def sample(config, base, lora, tokens, mask, key, sampler, numbers=None):
        events.append(f"sample {len(tokens)}")
        own = tokens[:, :1] if numbers is None else numbers[:, None]
        completions = own + 10 * jnp.arange(2)
        return Rollout(jnp.concatenate([tokens, completions], axis=1), completions, completions * 0.5)

    def score(completion, row):
        events.append(f"judge {completion}")
        return {"cells": float(completion), "puzzles": 0.0}

    prompts = Prompts(np.arange(5, dtype=np.int32).reshape(5, 1), np.ones((5, 1), bool), [{}] * 5)
    sampler = SamplerConfig(2, 2, 2, "low_confidence")
    for module in (rollout, completions):
        monkeypatch.setattr(module, "sample", sample)
    found = rollout.sample_in_parts(LLADA_8B, None, None, prompts, jax.random.key(0), sampler, part_rows=2)
    assert events == ["sample 2"] * 3
    np.testing.assert_array_equal(found.tokens, [[n, n, n + 10] for n in range(5)])
    assert isinstance(found.tokens, np.ndarray) and found.log_prob is None
    events.clear()
    monkeypatch.setattr(Tokenizer, "__init__", lambda self: None)
    monkeypatch.setattr(Tokenizer, "decode", lambda self, completions: [str(row[0]) for row in completions])
    task = dataclasses.replace(TASKS["sudoku"], measure=score)
    values = completions.evaluate_policy(
        LLADA_8B, None, None, prompts, sampler, task, Tokenizer(), batch_rows=2, key=jax.random.key(0)
    )
    assert values["cells"] == 2.0
    expected = ["sample 2", "sample 2", "judge 0", "judge 1", "sample 2", "judge 2", "judge 3", "judge 4"]
    assert events == expected
