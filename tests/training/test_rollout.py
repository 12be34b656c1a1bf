"""What becomes of completions: where they end, and rewards that no update may see."""

import dataclasses

import numpy as np
import pytest

from gdsd_jax.runtime.errors import UserError
from gdsd_jax.tasks import TASKS
from gdsd_jax.training.rollout import completion_mask, require_finite


def test_a_completion_ends_with_the_first_of_several_ids():
    completions = np.array([[3, 7, 3, 9], [3, 3, 3, 3], [9, 7, 3, 3]])
    np.testing.assert_array_equal(completion_mask(completions, (9, 7)), [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    np.testing.assert_array_equal(completion_mask(completions, 9), [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]])


def test_an_infinite_reward_is_named():
    task = dataclasses.replace(TASKS["gsm8k"], score=lambda completion, row: {"correct": float(completion)})
    finite = task.rewards(["1", "nan"], [{"answer": "1"}] * 2)
    require_finite(finite, task)
    with pytest.raises(UserError, match="the reward correct of the task gsm8k is inf for 1 of 2 completions"):
        require_finite(task.rewards(["1", "inf"], [{"answer": "1"}] * 2), task)
