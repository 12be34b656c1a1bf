"""The tasks room: golden rewards, generated and local rows, and scores of any text at all."""

import copy
import dataclasses
import datetime
import itertools
import json
import logging
import sys
from fractions import Fraction
from pathlib import Path

import fuzz
import numpy as np
import pytest
from fuzz import CASES
from hypothesis import given, settings
from hypothesis import strategies as st

from gdsd_jax.runtime.errors import UserError
from gdsd_jax.tasks import TASKS, countdown, resolve, sudoku
from gdsd_jax.tasks import format as answers
from gdsd_jax.tasks.task import SPLITS, weighted_sum

GOLDEN = Path(__file__).parents[1] / "golden" / "rewards" / "rewards.jsonl"
RECORDED = [json.loads(line) for line in GOLDEN.read_text(encoding="utf-8").splitlines()]

# The components of each reward function of the reference.
COMPONENTS = {
    "reward_func_countdown": "equation",
    "reward_func_sudoku": "cells_correct",
    "correctness_reward_func_gsm8k": "correct",
    "correctness_reward_func": "correct",
    "xmlcount_reward_func": "tags",
    "soft_format_reward_func": "loose",
    "strict_format_reward_func": "strict",
    "int_reward_func": "integer",
    "correctness_reward_func_math": "correct",
    "correctness_reward_func_math_xml": "correct",
    "boxed_and_answer_tags_format_reward_math": "format",
}

# Where the reference returns no number or another one on purpose, with what this project returns instead.
EXCEPTIONS = {
    "countdown_071": ("equation", 0.1, "the reference never returns: ** passes its filter; here it is no operator"),
    "countdown_072": ("equation", 0.1, "the reference never returns: ** passes its filter; here it is no operator"),
    "countdown_084": ("equation", 0.1, "the reference raises and kills the batch: '...' is an object of the language"),
    "countdown_085": ("equation", 0.1, "the reference raises and kills the batch: '()' is an object of the language"),
    "sudoku_115": ("cells_correct", 1.0, "the reference raises on a puzzle that is not 16 cells; both empty are right"),
    "math_xml_252": ("correct", 0.0, "the reference takes two boxes that never close for equal and pays in full"),
}

EXAMPLE_MODULE = """
import dataclasses
from gdsd_jax.tasks import TASKS

def score(completion, row):
    if "boom" in completion:
        raise RuntimeError("boom")
    return {"cells_correct": float("nan") if "nan" in completion else 1.0}

MINE = dataclasses.replace(TASKS["sudoku"], name="mine", score=score)
NOT_A_TASK = 3
"""


@pytest.mark.parametrize("name", CASES)
def test_golden_rewards(name):
    """Component by component, in one batch, on every recorded row."""
    cases = [case for case in RECORDED if case["family"] == name]
    task = resolve(name, grader="public")
    got = task.rewards([case["completion"] for case in cases], [case["kwargs"] for case in cases])
    for index, case in enumerate(cases):
        wanted = {COMPONENTS[function]: result.get("value") for function, result in case["results"].items()}
        if case["id"] in EXCEPTIONS:
            component, value, _ = EXCEPTIONS[case["id"]]
            assert wanted[component] != value
            wanted[component] = value
        assert set(wanted) == set(got)
        for component, value in wanted.items():
            assert got[component].dtype == np.float32
            np.testing.assert_allclose(got[component][index], value, rtol=1e-5, atol=1e-7, err_msg=case["id"])


def test_golden_rewards_are_complete():
    assert {case["family"] for case in RECORDED} == {*CASES, "code"}
    assert EXCEPTIONS.keys() <= {case["id"] for case in RECORDED}


# ---------------------------------------------------------------- answers in text


def test_tagged():
    assert answers.tagged("<answer>1</answer> x <answer>2</answer><answer>3") == ["1", "2"]
    assert answers.tagged("<answer><answer>1</answer></answer>") == ["<answer>1"]
    assert answers.tagged("</answer><answer>\n</answer>") == ["\n"]
    assert answers.tagged("<reasoning>a</reasoning>", "reasoning") == ["a"]
    assert answers.first_answer("<answer>1</answer><answer>2</answer>") == "1"
    assert answers.last_answer("<answer>1</answer><answer>2</answer>") == "2"
    assert answers.first_answer("<answer>") is None and answers.last_answer("") is None


def test_last_boxed():
    assert answers.last_boxed(r"\boxed{1} and \boxed{\frac{1}{2}} done") == r"\frac{1}{2}"
    assert answers.last_boxed(r"\boxed{}") == ""
    assert answers.last_boxed(r"\boxed{1") is None
    assert answers.last_boxed("1") is None


# ---------------------------------------------------------------- prompts and settings


def test_messages_fill_the_template_and_leave_other_braces():
    task = resolve("sudoku", template=r"{puzzle} in \boxed{} {1}", system="Be brief.", assistant_prefix="<reasoning>")
    assert task.messages({"puzzle": "0123", "solution": "x"}) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": r"0123 in \boxed{} {1}"},
    ]
    assert task.assistant_prefix == "<reasoning>"
    with pytest.raises(UserError, match="{grid}.*puzzle, solution"):
        resolve("sudoku", template="{grid}").messages({"puzzle": "0123", "solution": "x"})


@pytest.mark.parametrize("name", CASES)
def test_default_prompts(name):
    training, evaluation = resolve(name), resolve(name, evaluation=True)
    row = CASES[name].row
    for task in (training, evaluation):
        (turn,) = task.messages(row)
        assert all(tag in turn["content"] for tag in ("<reasoning>", "</reasoning>", "<answer>", "</answer>"))
    assert training.assistant_prefix == "" and evaluation.assistant_prefix.startswith("<reasoning>")
    assert resolve(name, evaluation=True, assistant_prefix="").assistant_prefix == ""


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("sudoku", {"puzzle": "0023300001300314", "solution": "1423324141322314"}),
        ("countdown", {"numbers": [3, 5, 7], "target": 22}),
    ],
)
def test_the_worked_example_of_an_evaluation_prompt_is_right(name, row):
    task = resolve(name, evaluation=True)
    (turn,) = task.messages(row)
    assert task.reward([turn["content"].split("a correct reply is")[1]], [row]) == 1.0


@pytest.mark.parametrize("name", CASES)
def test_shots_are_solved_training_problems(name):
    task = resolve(name, shots=3)
    row = CASES[name].row
    chat = task.messages(row)
    assert [turn["role"] for turn in chat] == ["user", "assistant"] * 3 + ["user"]
    assert chat[-1] == resolve(name).messages(row)[0]
    examples = list(task.examples)
    answers = [turn["content"] for turn in chat[1::2]]
    np.testing.assert_array_equal(task.metrics(answers, examples)[task.metrics_named[-1]], 1.0)
    assert (task.reward(answers, examples) >= (1.0 if len(task.weights) == 1 else 2.0)).all()
    assert resolve(name, shots=1, examples=[row]).messages(row)[0] == chat[-1]
    with pytest.raises(UserError, match="examples"):
        resolve(name, shots=len(examples) + 1)


def test_examples_are_of_the_training_split():
    assert sudoku.overlap(TASKS["sudoku"].examples) == {"train": 3, "validation": 0, "test": 0}
    assert sudoku.overlap([{"solution": "1423324141322314"}])["train"] == 1
    assert {countdown.split_of(row["numbers"], row["target"]) for row in TASKS["countdown"].examples} == {"train"}


def test_answer_template():
    row = {"puzzle": "0000000000000000", "solution": "1243341221344321"}
    assert resolve("sudoku").answer(row) == "<answer>1243341221344321</answer>"
    assert resolve("sudoku", answer_template="{puzzle}:{solution}").answer(row) == f"{row['puzzle']}:{row['solution']}"


def test_resolve_refuses_what_it_does_not_know():
    with pytest.raises(UserError, match="sudoku, countdown"):
        resolve("chess")
    for name in ("no_such_module_here:TASK", ":TASK", "gdsd_jax.tasks.sudoku:NOTHING"):
        with pytest.raises(UserError, match=f"task '{name}' cannot be imported"):
            resolve(name)
    with pytest.raises(UserError, match="setting 'prompt'"):
        resolve("sudoku", prompt="{puzzle}")
    with pytest.raises(UserError, match="cells_correct"):
        resolve("sudoku", weights={"cells": 1.0})


def test_weights_scale_components():
    row = TASKS["sudoku"].rows("test", count=1)[0]
    assert (
        resolve("sudoku", weights={"cells_correct": 2.5}).reward([f"<answer>{row['solution']}</answer>"], [row]) == 2.5
    )
    assert resolve("sudoku", weights=None, template=None).reward([""], [row]) == 0.0


def test_own_task_that_raises_costs_only_its_item(tmp_path, monkeypatch, caplog):
    (tmp_path / "my_sudoku_task.py").write_text(EXAMPLE_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    task = resolve("my_sudoku_task:MINE", system="x")
    rows = task.rows("test", count=3)
    with caplog.at_level(logging.WARNING):
        components = task.rewards(["fine", "boom", "nan"], rows)
    np.testing.assert_array_equal(components["cells_correct"], np.float32([1.0, np.nan, np.nan]))
    assert "mine: 1 of 3 completions could not be scored" in caplog.text
    np.testing.assert_array_equal(task.reward(["fine", "boom", "nan"], rows), [1.0, 0.0, 0.0])
    with pytest.raises(UserError, match="not a gdsd_jax.tasks.Task"):
        resolve("my_sudoku_task:NOT_A_TASK")
    with pytest.raises(UserError, match="cannot be imported"):
        resolve("my_sudoku_task:MISSING")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weights": {}}, "weights must give a finite number to each reward, they are {}"),
        ({"weights": {"even": "1"}}, "weights must give a finite number"),
        ({"weights": {"even": float("nan")}}, "weights must give a finite number"),
        ({"metrics_named": ()}, "metrics_named must name at least one metric"),
        ({"threads": -1}, "threads must be at least 1, it is -1"),
    ],
)
def test_own_task_with_which_no_run_can_end_is_refused(changes, said):
    with pytest.raises(UserError, match=f"task mine: {said}"):
        dataclasses.replace(TASKS["sudoku"], name="mine", **changes)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "task mine gives no row"),
        (None, "task mine gives a NoneType"),
        (iter([{}]), "task mine gives a list_iterator"),
        (["text"], "task mine gives a str as a row"),
        ([{None: 1, "a": 2}], "'<' not supported"),
        ([{"day": datetime.date(2026, 1, 1)}], "Object of type date is not JSON serializable"),
        ([{"number": np.int64(1)}], "Object of type int64 is not JSON serializable"),
    ],
)
def test_own_rows_that_no_file_can_keep_are_refused(rows, said):
    task = dataclasses.replace(TASKS["sudoku"], name="mine", source=lambda *_: rows, read=lambda _: rows)
    for path in (None, "rows.csv"):
        with pytest.raises(UserError, match=said):
            task.rows("test", path=path)


def test_numbers_of_numpy_and_tuples_of_rows_are_taken():
    rows = ({"puzzle": "1"}, {"puzzle": "2"})
    weights = {"cells_correct": np.float32(0.5), "other": np.int64(1)}
    task = dataclasses.replace(TASKS["sudoku"], weights=weights, threads=np.int64(2), source=lambda *_: rows)
    assert task.rows("test") == list(rows)


def test_own_task_that_would_end_the_command_costs_only_its_item(tmp_path, monkeypatch):
    row = TASKS["sudoku"].rows("test", count=1)
    leaves = dataclasses.replace(TASKS["sudoku"], score=lambda completion, row: sys.exit(0), limits=None)
    assert np.isnan(leaves.rewards([""], row)["cells_correct"]).all()
    monkeypatch.syspath_prepend(tmp_path)
    modules = {"SystemExit": "raise SystemExit(0)", "SyntaxError": "def f(:", "NameError": "TASK = Tsak()"}
    for kind, text in modules.items():
        (tmp_path / f"broken_{kind.lower()}.py").write_text(text)
        with pytest.raises(UserError, match=f"cannot be imported: {kind}"):
            resolve(f"broken_{kind.lower()}:TASK")


def test_threads_keep_the_order():
    rows = [{"puzzle": "0" * 16, "solution": "1" * index + "2" * (16 - index)} for index in range(1, 9)]
    task = dataclasses.replace(TASKS["sudoku"], threads=4)
    got = task.rewards(["<answer>" + "1" * 16 + "</answer>"] * 8, rows)["cells_correct"]
    np.testing.assert_allclose(got, np.arange(1, 9) / 16)


def test_weighted_sum_counts_nan_as_zero():
    parts = {"a": np.float32([1, np.nan, 3]), "b": np.float32([1, 1, np.nan])}
    np.testing.assert_array_equal(weighted_sum(parts, {"a": 1.0, "b": -2.0}), np.float32([-1, -2, 3]))


def test_batches_of_different_length_are_a_mistake():
    with pytest.raises(ValueError, match="2 completions for 1 rows"):
        TASKS["sudoku"].rewards(["", ""], TASKS["sudoku"].rows("test", count=1))
    assert TASKS["sudoku"].reward([], []).shape == (0,)


# ---------------------------------------------------------------- sudoku


def _is_solved(grid: str) -> bool:
    units = [[grid[4 * r + c] for c in range(4)] for r in range(4)]
    units += [[grid[4 * r + c] for r in range(4)] for c in range(4)]
    units += [[grid[4 * (r + i) + c + j] for i in (0, 1) for j in (0, 1)] for r in (0, 2) for c in (0, 2)]
    return all(sorted(unit) == list("1234") for unit in units)


def _count_solutions(puzzle: str) -> int:
    """By trying digits cell by cell: nothing shared with the generator."""
    if "0" not in puzzle:
        return int(_is_solved(puzzle))
    index = puzzle.index("0")
    row, column = divmod(index, 4)
    seen = {puzzle[4 * row + k] for k in range(4)} | {puzzle[4 * k + column] for k in range(4)}
    return sum(_count_solutions(puzzle[:index] + d + puzzle[index + 1 :]) for d in "1234" if d not in seen)


def test_the_288_grids_and_their_splits():
    assert len(set(sudoku.grids())) == 288 and all(map(_is_solved, sudoku.grids()))
    parts = [set(sudoku.solutions(split)) for split in SPLITS]
    assert [len(part) for part in parts] == [192, 32, 64]
    assert set().union(*parts) == set(sudoku.grids())


@pytest.mark.parametrize("split", SPLITS)
def test_generated_puzzles(split):
    rows = TASKS["sudoku"].rows(split, count=256)
    assert len(rows) == 256
    assert len(rows if split == "train" else TASKS["sudoku"].rows(split)) == 256
    assert {row["solution"] for row in rows} <= set(sudoku.solutions(split))
    empties = [row["puzzle"].count("0") for row in rows]
    assert set(empties) == {8, 9, 10, 11}
    assert all(clue in ("0", digit) for row in rows for clue, digit in zip(*row.values(), strict=True))
    assert all(_count_solutions(row["puzzle"]) == 1 for row in rows[:64])


def test_generated_puzzles_are_reproducible():
    task = TASKS["sudoku"]
    assert task.rows("train", count=300, seed=5) == task.rows("train", count=600, seed=5)[:300]
    assert task.rows("train", count=64, seed=5) != task.rows("train", count=64, seed=6)
    assert task.rows("test") == task.rows("test", seed=7)
    assert len({row["puzzle"] for row in task.rows("test")}) == 256
    assert task.rows("test", count=1) == [{"puzzle": "0003130200300401", "solution": "4213134221343421"}]


def test_unique_counts_solutions():
    puzzles = ["1200341221344321", "1200340021340021", "0" * 16, "1243341221344321"]
    expected = [_count_solutions(puzzle) == 1 for puzzle in puzzles]
    assert set(expected) == {True, False}
    np.testing.assert_array_equal(sudoku.unique(np.array([list(map(int, p)) for p in puzzles], np.int8)), expected)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_sudoku_csv(tmp_path, newline):
    path = tmp_path / "puzzles.csv"
    lines = ["Puzzle,Solution", "0140432014020000,2143432114323214", "3102200002100320,3142243142131324"]
    path.write_text(newline.join(lines) + newline, newline="")
    rows = TASKS["sudoku"].rows("test", path=path)
    assert rows == [dict(zip(("puzzle", "solution"), line.split(","), strict=True)) for line in lines[1:]]
    assert TASKS["sudoku"].rows("train", path=str(path), count=2) == rows
    with pytest.raises(UserError, match="has 2 rows, 3"):
        TASKS["sudoku"].rows("train", path=path, count=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows"),
        ("a,b\n1,2\n", "row 1: a row needs Puzzle or puzzle, it has a, b"),
        ("Puzzle,Solution\n", "no rows"),
        ("Puzzle,Solution\n0140432014020000\n", "row 1: 2 columns"),
        ('Puzzle,Solution\n"' + "0" * 200_000 + '",1\n', "not CSV"),
        ("Puzzle,Solution\n140432014020000,2143432114323214\n", "row 1: the puzzle must be 16 digits"),
        ("Puzzle,Solution\n0150432014020000,2143432114323214\n", "row 1: the puzzle must be 16 digits"),
        ("Puzzle,Solution\n٠140432014020000,2143432114323214\n", "row 1: the puzzle must be 16 digits"),
        ("Puzzle,Solution\n0140432014020000,2143432114323211\n", "row 1: the solution is not"),
        (
            "Puzzle,Solution\n0140432014020000,2143432114323214\n0240432014020000,2143432114323214\n",
            "row 2: .*contradicts",
        ),
    ],
)
def test_sudoku_csv_refuses(tmp_path, text, message):
    path = tmp_path / "puzzles.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        TASKS["sudoku"].rows(path=path)


@pytest.mark.parametrize(
    ("completion", "cells", "puzzles"),
    [
        ("<answer>1243341221344321</answer>", 1, 1),
        ("<answer>1243 3412\n2134 4321</answer>", 1, 1),
        ("puzzle 1000040000300002, so 1243341221344321 it is", 1, 1),
        ("1243341221344321", 1, 1),
        ("12433412213443211", 0, 0),
        ("<answer>12433412213443219</answer>", 1, 1),
        ("<answer>1243341221344321", 1, 1),
        ("<answer>1243341221</answer>", 8 / 12, 0),
        ("<answer>2243341221344321</answer>", 1, 0),
        ("<answer>no digits</answer> 1243341221344321", 1, 1),
        ("<answer></answer>", 0, 0),
        ("", 0, 0),
    ],
)
def test_sudoku_metric(completion, cells, puzzles):
    row = {"puzzle": "1000040000300001", "solution": "1243341221344321"}
    got = TASKS["sudoku"].metrics([completion], [row])
    np.testing.assert_allclose([got["cells"][0], got["puzzles"][0]], [cells, puzzles], rtol=1e-6)


# ---------------------------------------------------------------- countdown


@pytest.mark.parametrize("split", SPLITS)
def test_generated_problems(split):
    task = TASKS["countdown"]
    rows = task.rows(split, count=256, seed=3)
    assert {countdown.split_of(row["numbers"], row["target"]) for row in rows} == {split}
    assert all(len(row["numbers"]) == 3 and 1 <= row["target"] <= 100 for row in rows)
    texts = [task.answer(row) for row in rows]
    np.testing.assert_array_equal(task.reward(texts, rows), 1.0)
    np.testing.assert_array_equal(task.metrics(texts, rows)["accuracy"], 1.0)
    wrong = [{**row, "target": row["target"] + 1} for row in rows]
    np.testing.assert_allclose(task.reward(texts, wrong), 0.1)
    assert task.rows(split, count=100, seed=3) == rows[:100]
    assert (task.rows(split, count=256, seed=4) == rows) == (split != "train")


def test_problems_do_not_depend_on_the_order_of_numbers():
    for numbers in itertools.permutations([3, 5, 7]):
        assert countdown.split_of(list(numbers), 22) == countdown.split_of([3, 5, 7], 22)


def test_countdown_jsonl(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_bytes(
        b'{"input": "30,100,93", "output": "23"}\r\n\r\n{"nums": [3, 5, 7], "target": 22}\n'
        b'{"nums": [3, 5, 7, 9], "target": 22}\n{"nums": [1, 1, 1], "target": 90}'
    )
    rows = TASKS["countdown"].rows("test", path=path)
    assert rows == [
        {"numbers": [30, 100, 93], "target": 23},
        {"numbers": [3, 5, 7], "target": 22},
        {"numbers": [1, 1, 1], "target": 90},
    ]
    texts = [TASKS["countdown"].answer(row) for row in rows[:2]]
    np.testing.assert_array_equal(TASKS["countdown"].reward(texts, rows[:2]), 1.0)
    with pytest.raises(UserError, match="no expression makes 90"):
        TASKS["countdown"].answer(rows[2])
    assert len(TASKS["countdown"].rows("test", path=path, count=2, seed=1)) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows"),
        ("3,5,7", "line 1: not JSON"),
        ("[" * 100_000, "line 1: not JSON"),
        ('"3,5,7"', "line 1: a JSON object"),
        ('{"input": "3,5,7", "output": "22"}\n{"input": "3,5,7"}', "line 2: a row needs output"),
        ('{"input": "3,5,7"}', "line 1: a row needs output"),
        ('{"numbers": [3, 5, 7]}', "line 1: a row needs input or nums"),
        ('{"input": "3,5", "output": "22"}', "line 1: 3 numbers"),
        ('{"input": "3,5,x", "output": "22"}', "line 1: numbers and target must be integers"),
        ('{"nums": [3, 5, 7.5], "target": 22}', "line 1: numbers and target must be integers"),
        ('{"nums": "357", "target": 22}', "line 1: nums must be a list"),
        ('{"nums": [3, 5], "target": 22}', "no row with 3 numbers"),
    ],
)
def test_countdown_jsonl_refuses(tmp_path, text, message):
    path = tmp_path / "problems.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        TASKS["countdown"].rows(path=path)


@pytest.mark.parametrize(
    ("completion", "accuracy"),
    [
        ("<answer>3*5+7</answer>", 1),
        ("<answer>3*5+7=22</answer>", 1),
        ("<answer>3*5 + 7 = 22.</answer>", 1),
        (r"so \boxed{3 \times 5 + 7}", 1),
        (r"<answer>\boxed{3 \cdot 5 + 7 = 22}</answer>", 1),
        ("3*5+7", 1),
        ("It is 3*5+7 = 22", 1),
        (r"\boxed{22}", 0),
        ("<answer>3*5</answer>", 0),
        ("", 0),
    ],
)
def test_countdown_metric(completion, accuracy):
    row = {"numbers": [3, 5, 7], "target": 22}
    assert TASKS["countdown"].metrics([completion], [row])["accuracy"] == accuracy
    assert TASKS["countdown"].metrics([r"\boxed{8 \div 4}"], [{"numbers": [8, 4], "target": 2}])["accuracy"] == 1


@given(
    st.recursive(
        st.integers(0, 30).map(str),
        lambda inner: st.one_of(
            st.tuples(inner, st.sampled_from(["+", "-", "*", "/", " + ", "*-"]), inner).map("".join),
            inner.map("({})".format),
            inner.map("-{}".format),
        ),
        max_leaves=12,
    )
)
@settings(max_examples=200, deadline=None)
def test_compute_agrees_with_python(expression):
    exact = "".join(f"F({part})" if part.isdigit() else part for part in _numbers_apart(expression))
    try:
        expected = eval(exact, {"F": Fraction})  # the test's own text, never a completion
    except ZeroDivisionError:
        expected = None
    assert countdown.compute(expression) == expected


@pytest.mark.parametrize("text", ["3+", "3*5+7-", "-", "(3", "3)", "()", "3 5", "(3+)", "3--", "3\n+5", "", "1/(5-5)"])
def test_compute_refuses(text):
    assert countdown.compute(text) is None


def _numbers_apart(expression: str) -> list[str]:
    return ["".join(group) for _, group in itertools.groupby(expression, str.isdigit)]


# ---------------------------------------------------------------- any text at all


@pytest.mark.parametrize("name", CASES)
def test_malformed_answers(name):
    """The small count of what `python tests/fuzz.py` runs at any size."""
    report = fuzz.run(TASKS[name], CASES[name], count=40 if TASKS[name].limits else 400, seed=1)
    assert report.failures == []
    right = TASKS[name].metrics([CASES[name].right], [CASES[name].row])
    assert all(value == 1 for value in right.values())


@pytest.mark.parametrize("name", [name for name in CASES if not TASKS[name].limits])
@given(st.data())
@settings(max_examples=100, deadline=None)
def test_scores_are_bounded_and_pure(name, data):
    task, row = TASKS[name], copy.deepcopy(CASES[name].row)
    text = data.draw(fuzz.strategy(CASES[name]))
    scores = {**task.rewards([text], [row]), **task.metrics([text], [row])}
    again = {**task.rewards([text], [row]), **task.metrics([text], [row])}
    assert all(component == "tags" or 0 <= value[0] <= 2 for component, value in scores.items())
    assert scores == again and row == CASES[name].row


NASTY = {
    "a 10,000-digit number": "<answer>" + "7" * 10_000 + "*3*5</answer>",
    "decimals without end": "<answer>3*5+7." + "0" * 100_000 + "</answer>",
    "100,000 parentheses": "<answer>" + "(" * 100_000 + "3*5+7" + ")" * 100_000 + "</answer>",
    "a chain of powers": "<answer>" + "9**" * 20_000 + "9</answer>",
    "a chain of signs": "<answer>" + "-" * 100_000 + "3*5+7</answer>",
    "a chain of divisions": "<answer>" + "1/3/" * 25_000 + "1</answer>",
    "opening tags": "<answer>" * 20_000,
    "closing tags": "</answer>" * 20_000,
    "open braces": "\\boxed{" * 20_000,
    "balanced braces": "\\boxed{" + "{}" * 50_000,
    "spaces": "<answer>" + " " * 100_000 + "x</answer>",
    "equals signs": "<answer>" + "3*5+7 " * 20_000 + "=" * 20_000 + "</answer>",
    "digits without an equals sign": "1" * 200_000,
    "runs of digits": "1234123412341234 " * 10_000 + "x",
}


@pytest.mark.parametrize("kind", NASTY)
def test_nasty_texts_are_only_wrong(kind):
    completion, numbers, grid = NASTY[kind], CASES["countdown"].row, CASES["sudoku"].row
    answered = "</answer>" in completion and completion.startswith("<answer>")
    np.testing.assert_allclose(TASKS["countdown"].reward([completion], [numbers]), 0.1 if answered else 0.0)
    assert TASKS["countdown"].metrics([completion], [numbers])["accuracy"] == 0
    assert TASKS["sudoku"].reward([completion], [grid]) < 1
    assert TASKS["sudoku"].metrics([completion], [grid])["puzzles"] == 0
