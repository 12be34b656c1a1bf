"""GSM8K and MATH: answers in every form, reference answers, and training from local files to its end."""

import json

import numpy as np
import pytest
import reference_answers
import tiny_run
from surroundings import surroundings  # noqa: F401  (a fixture that acts by itself)

from gdsd_jax import train
from gdsd_jax.tasks import TASKS
from gdsd_jax.tasks import math as math_task
from gdsd_jax.tasks.format import last_boxed

WORDS = [
    {"question": f"Kim has {n} boxes of {m} pens and loses {k}. How many are left?",
     "answer": f"{n} * {m} = <<{n}*{m}={n * m}>>{n * m}\n{n * m} - {k} = {n * m - k}\n#### {n * m - k:,}"}
    for n in range(2, 60, 7) for m in (3, 40) for k in (1, 5)
]  # fmt: skip
PROBLEMS = [
    {"problem": f"Solve for $x$ ({index}).", "solution": f"Thus $x = \\boxed{{{answer}}}$.", "answer": answer}
    for index, answer in enumerate((
        "\\frac{3}{4}", "2\\sqrt{5}", "\\left( 3, \\frac{\\pi}{2} \\right)", "x^2 - 3x + 1", "[0, 4)",
        "\\text{Tuesday}", "x \\in [-2,7]", "12\\%", "90^\\circ", "-1, 2, 5",
        "\\begin{pmatrix} 1 \\\\ -2 \\end{pmatrix}", "1,250",
    ))
]  # fmt: skip


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["gsm8k", "gsm8k_xml", "math", "math_xml"])
def test_reference_answers_have_full_marks_and_altered_ones_none(tmp_path, name):
    report = reference_answers.run(name, lines(tmp_path / "rows.jsonl", WORDS if "gsm8k" in name else PROBLEMS))
    assert report.short == {} and report.counted == []
    assert report.rows == len(WORDS if "gsm8k" in name else PROBLEMS)


def test_reference_answers_of_the_planning_tasks(tmp_path):
    numbers = [{"input": "3,5,7", "output": "22"}, {"input": "60,4,10", "output": "24"}]
    (tmp_path / "puzzles.csv").write_text("Puzzle,Solution\n0140432014020000,2143432114323214\n")
    for name, path in (("countdown", lines(tmp_path / "n.jsonl", numbers)), ("sudoku", tmp_path / "puzzles.csv")):
        report = reference_answers.run(name, path)
        assert report.full == report.altered == report.rows


def test_a_row_that_falls_short_is_named(tmp_path):
    rows = [WORDS[0], {"question": "How cold?", "answer": "#### -3"}]
    report = reference_answers.run("gsm8k_xml", lines(tmp_path / "rows.jsonl", rows))
    assert report.short == {2: "integer 0: -3"} and report.counted == []


@pytest.mark.parametrize(
    ("completion", "answer", "accuracy"),
    [
        ("\\boxed{42}", "42", 1),
        ("\\boxed{\\$42.00}", "42", 1),
        ("<answer>1,234</answer>", "1234", 1),
        ("<answer>42 apples</answer> or 43", "42", 1),
        ("#### 42\nThe rest is 7.", "42", 1),
        ("It is 7.\n#### 42", "42", 1),
        ("so there are 042 of them", "42", 1),
        ("\\boxed{?} <answer>42</answer>", "42", 1),
        ("-$5", "-5", 1),
        ("5", "-5", 0),
        ("-0", "0", 1),
        (".5", "0.50", 1),
        ("4" * 100_000, "4", 0),
        ("no number", "0", 0),
        ("", "42", 0),
        ("٤٢", "42", 0),
    ],
)
def test_gsm8k_metric(completion, answer, accuracy):
    assert TASKS["gsm8k"].metrics([completion], [{"answer": answer}])["accuracy"] == accuracy
    assert TASKS["gsm8k_xml"].metrics([completion], [{"answer": answer}])["accuracy"] == accuracy


def test_math_metric_is_more_lenient_than_either_reward():
    cases = [
        ("\\boxed{\\frac{2}{4}}", "\\frac{1}{2}", 1),
        ("<answer>It is $\\boxed{\\dfrac12}$.</answer> \\boxed{3}", "\\frac{1}{2}", 1),
        ("<answer>\\boxed{3}</answer><answer>\\boxed{0.5}</answer>", "\\frac{1}{2}", 1),
        ("\\boxed{\\text{Tuesday}}", "\\text{Tuesday}", 1),
        ("\\boxed{x \\in [-3,7]}", "x \\in [-2,7]", 0),
        ("\\boxed{[-2, 7]}", "x \\in [-2,7]", 1),
        ("\\boxed{\\{2, 1\\}}", "x \\in \\{1, 2\\}", 1),
        ("\\boxed{3", "\\boxed{3", 0),
        ("", "3", 0),
    ]
    rows = [{"answer": answer} for _, answer, _ in cases]
    got = TASKS["math"].metrics([completion for completion, _, _ in cases], rows)["accuracy"]
    np.testing.assert_array_equal(got, [accuracy for _, _, accuracy in cases])


def test_math_that_cannot_be_computed_is_wrong_and_costs_no_one_else():
    towers = ["\\boxed{9^{9^{9^{9}}}}", "9**9**9**9", "\\boxed{((10^{10})!)!}", "\\boxed{2^{2^{2^{2^{2^{2}}}}}}"]
    completions = [*towers, "\\boxed{" * 3000, "\\boxed{3}"]
    got = TASKS["math"].reward(completions, [{"answer": "3"}] * len(completions))
    np.testing.assert_array_equal(got, [0, 0, 0, 0, 0, 2])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("\\dfrac{1}{2}", "\\frac12"),
        ("\\tfrac1{2}", "1/2"),
        (".5", "0.5"),
        ("x = 3", "3"),
        ("5\\text{ cm}", "5"),
        ("50\\%", "50"),
        ("90^{\\circ}", "90^\\circ"),
        ("\\sqrt2", "\\sqrt{2}"),
        ("\\left( 1,\\!2 \\right)", "(1,2)"),
        ("\\$ 5", "5"),
        ("\\frac{.5}{3}", "\\frac{0.5}{3}"),
    ],
)
def test_spellings_without_meaning(one, other):
    assert math_task.normalise(one) == math_task.normalise(other)


@pytest.mark.parametrize(("one", "other"), [("1,000", "1000"), ("2=3=4", "4"), ("3.0", "3"), ("1/02", "\\frac{1}{2}")])
def test_spellings_with_meaning(one, other):
    assert math_task.normalise(one) != math_task.normalise(other)


def test_normalisation_is_linear_in_hostile_text():
    for piece in ("\\frac", "\\sqrt", "\\text{ ", "=", ".", "{.", "\\left", "1/", "\\boxed ", "\\frac1"):
        text = piece * (200_000 // len(piece))
        assert isinstance(math_task.normalise(text), str)
        assert math_task.boxed(text) is None or last_boxed(text) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gsm8k", "gsm8k_xml", "math", "math_xml"])
def test_training_from_local_files(tmp_path, name):
    config = tiny_run.build(tmp_path)
    rows = WORDS if "gsm8k" in name else PROBLEMS * 2
    workdir, files = tmp_path / "run", [lines(tmp_path / "train.jsonl", rows), lines(tmp_path / "few.jsonl", rows[:8])]
    tiny_run.command(
        train, "--config", config, "--workdir", workdir, f"--config.task.name={name}", "--config.iterations=3",
        f"--config.task.train_path={files[0]}", f"--config.task.validation_path={files[1]}",
        "--config.task.settings.template={question}", "--config.evaluation.split=validation",
        "--config.overlong_prompts=keep_last",
    )  # fmt: skip
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3]
    for line in metrics:
        assert {f"reward/{component}" for component in TASKS[name].weights} < line.keys()
        assert np.isfinite(line["loss"]) and line["time/rewards_per_second"] > 0 and line["reward/nan"] == 0
    assert 0 <= metrics[-1]["eval/accuracy"] <= 1
