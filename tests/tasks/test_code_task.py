"""The code task: format, rows of three kinds, rewards and metric; three iterations of training on it."""

import json
import random
import shutil

import fuzz
import numpy as np
import pytest
import tiny_run
from surroundings import surroundings  # noqa: F401  (a fixture that acts by itself)

from gdsd_jax import train
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.tasks import TASKS, code, resolve, sandbox

RIGHT = "Add one.\n```python\ndef up(x):\n    return x + 1\n```"
MBPP = {
    "text": "Write a function that adds one.", "code": "def up(x):\r\n    return x + 1", "task_id": 1,
    "test_setup_code": "start = 4", "test_list": ["assert up(1) == 2", "assert up(start) == 5"],
    "challenge_test_list": [],
}  # fmt: skip
HUMAN_EVAL = {
    "task_id": "own/0", "prompt": "def up(x):\n    \"\"\"One more.\"\"\"\n", "canonical_solution": "    return x + 1\n",
    "entry_point": "up", "test": "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(2) == 3\n",
}  # fmt: skip
OWN = {"question": "Add one.", "test_cases": ["assert up(1) == 2", "assert up(2) == 3"]}


def write(path, *rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return code.read(write(tmp_path_factory.mktemp("rows") / "rows.jsonl", OWN, MBPP, HUMAN_EVAL))


def test_format_is_the_references(golden):
    records = map(json.loads, (golden / "rewards" / "rewards.jsonl").read_text().splitlines())
    recorded = [record for record in records if record["family"] == "code"]
    assert len(recorded) == 27
    for record in recorded:
        wanted = record["results"]["code_format_reward"]["value"]
        assert code.format_reward(record["completion"]) == wanted, record["id"]


def test_rows_of_three_kinds(rows):
    assert [len(row["tests"]) for row in rows] == [2, 2, 1]
    assert "assert up(1) == 2" in TASKS["code"].messages(rows[0])[-1]["content"]
    assert rows[2]["tests"][0].endswith("check(up)")
    assert [row["program"].count("return") for row in rows] == [0, 1, 1]


@pytest.mark.parametrize(
    "record",
    [
        {"question": "q"},
        {"question": "q", "test_cases": []},
        {**MBPP, "test_list": [1]},
        # Every program would pass the first three, and none the last.
        *({"question": "q", "test_cases": ["assert f()", text]} for text in ("", "# to do", "pass", "assert (")),
    ],
)
def test_bad_rows_are_named(tmp_path, record):
    with pytest.raises(UserError, match="rows.jsonl, line 1"):
        code.read(write(tmp_path / "rows.jsonl", record), sandboxed=False)


def test_no_rows_without_a_file():
    with pytest.raises(UserError, match="config.task.train_path"):
        TASKS["code"].rows("train")


def test_rewards_and_metric(rows):
    wrong, half = RIGHT.replace("+ 1", "+ 2"), RIGHT.replace("x + 1", "2")
    bare = "def up(x):\n    return x + 1"
    completions = [RIGHT, wrong, half, bare, RIGHT.replace("return", "return ("), ""]
    task = TASKS["code"]
    found = task.rewards(completions, [rows[0]] * len(completions))
    np.testing.assert_array_equal(found["format"], [1, 1, 1, 0, 0.5, 0])
    np.testing.assert_array_equal(found["tests"], [1, 0, 0.5, 0, 0, 0])
    assert task.reward([RIGHT], [rows[1]]) == 2
    np.testing.assert_array_equal(task.metrics(completions, [rows[0]] * 6)["passed"], [1, 0, 0, 1, 0, 0])
    np.testing.assert_array_equal(task.metrics([RIGHT, wrong], [rows[2]] * 2)["passed"], [1, 0])
    # From Python, a row may also be given as a file has it.
    for grader in ("robust", "public"):
        given = resolve("code", grader=grader)
        np.testing.assert_array_equal(given.reward([RIGHT, half], [{"test_cases": OWN["test_cases"]}] * 2), [2, 1.5])
        np.testing.assert_array_equal(given.metrics([RIGHT, half], [HUMAN_EVAL, MBPP])["passed"], [1, 0])


def test_the_unsafe_task_is_named_in_full(rows):
    task = resolve("gdsd_jax.tasks.code:UNSAFE")
    assert task.reward([RIGHT], [rows[0]]) == 2


def test_reading_rows_refuses_without_a_sandbox(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    sandbox.find.cache_clear()
    with pytest.raises(UserError, match="no sandbox for running code"):
        TASKS["code"].rows(path=write(tmp_path / "rows.jsonl", OWN))
    sandbox.find.cache_clear()


def test_malformed_answers():
    """The small count of what `python tests/fuzz.py --tasks code` runs at any size."""
    draw = random.Random(0)
    texts = [fuzz.malformed(draw, fuzz.CODE) for _ in range(300)]
    assert {code.format_reward(text) for text in texts} == {0.0, 0.5, 1.0}


@pytest.mark.slow
def test_malformed_programs():
    report, programs = fuzz.run_code(800)
    assert not report.failures and report.lost == report.over == 0
    found = fuzz.run_programs(programs, 40)
    assert found["failures"] == 0 and sum(found["verdicts"].values()) == 80
    assert set(found["verdicts"]) >= {"PASSED", "FAILED"}


@pytest.mark.slow
def test_code_trains(tmp_path):
    """Random weights write no program: what is shown is that rows, prompts, rewards and updates go together."""
    file = tiny_run.build(tmp_path)
    data = write(tmp_path / "rows.jsonl", *({**MBPP, "text": f"Add one, {i}."} for i in range(40)))
    settings = {"task.name": "code", "task.train_path": data, "task.eval_path": data, "overlong_prompts": "keep_last"}
    settings |= {"task.settings.template": "{question}", "iterations": 3}
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    tiny_run.command(train, "--config", file, "--workdir", tmp_path / "run", *flags)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert sum("reward" in line for line in lines) >= 3


def test_worked_examples_have_full_marks():
    task, rows = TASKS["code"], list(TASKS["code"].examples)
    answers = [f"One line does it.\n{task.answer(row)}" for row in rows]
    np.testing.assert_array_equal(task.reward(answers, rows), [2.0, 2.0])
    np.testing.assert_array_equal(task.metrics(answers, rows)["passed"], [1.0, 1.0])
