"""The example of docs/new_task.md: the same text, scored in workers, trained and resumed."""

import json
from pathlib import Path

import example_task
import numpy as np
import pytest
import tiny_run
from surroundings import surroundings  # noqa: F401  (a fixture that acts by itself)

from gdsd_jax import evaluate, train
from gdsd_jax.tasks import resolve

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--config.task.name=example_task:TASK", "--config.task.settings.template={word}"]


def test_the_guide_prints_the_example():
    guide = (ROOT / "docs" / "new_task.md").read_text()
    assert f"```python\n{(ROOT / 'tests' / 'example_task.py').read_text()}```" in guide


def test_its_own_answers_have_full_marks():
    task = resolve("example_task:TASK", weights={"answered": 0.5})
    rows = task.rows("test", count=8)
    np.testing.assert_array_equal(task.reward([task.answer(row) for row in rows], rows), 1.5)
    np.testing.assert_array_equal(task.metrics([task.answer(row) for row in rows], rows)["accuracy"], 1)
    assert (task.reward([task.answer(row)[::-1] for row in rows], rows) == 0).all()
    assert task.rows("train", count=20, seed=1) == task.rows("train", count=30, seed=1)[:20]


@pytest.mark.slow
def test_it_trains_and_is_evaluated(tmp_path):
    config = tiny_run.build(tmp_path)
    workdir = tmp_path / "run"
    words = tmp_path / "words.csv"
    words.write_text("word\n" + "".join(f"{row['word']}\n" for row in example_task.source("train", 20, 5)))
    tiny_run.command(
        train, "--config", config, "--workdir", workdir, *FLAGS, f"--config.task.train_path={words}",
        "--config.evaluation.split=validation",
    )  # fmt: skip
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert {"reward/letters", "reward/answered", "time/rewards_per_second"} < metrics[-1].keys()
    tiny_run.command(evaluate, "--config", config, "--workdir", workdir, *FLAGS, "--lengths", "8")
    (result,) = json.loads((workdir / "evaluation" / "evaluation.json").read_text())["results"]
    assert result["task"] == "letters" and "accuracy" in result["metrics"]


def test_a_file_without_the_column_ends_the_run_at_its_start(tmp_path, capsys):
    words = tmp_path / "words.csv"
    words.write_text("text\nabc\n")
    config = tiny_run.build(tmp_path)
    with pytest.raises(SystemExit):
        tiny_run.command(train, "--config", config, "--workdir", tmp_path / "run", *FLAGS,
                         f"--config.task.train_path={words}")  # fmt: skip
    assert "words.csv, row 1: a row needs word, it has text" in capsys.readouterr().err
