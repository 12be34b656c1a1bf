"""Evaluation: statistics, the table over tasks and lengths, resumption, sampling, comparison, the best checkpoint."""

import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
from surroundings import surroundings  # noqa: F401  (a fixture that acts by itself)

from gdsd_jax import evaluate, train
from gdsd_jax.config.flags import parse
from gdsd_jax.evaluation import reports, statistics
from gdsd_jax.evaluation.policy import load_policy
from gdsd_jax.evaluation.reports import UNFINISHED
from gdsd_jax.runtime import transfer
from gdsd_jax.runtime.console import Console
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.files import Lock

FILES = (reports.SUMMARY, reports.TABLE, reports.COMPLETIONS)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    return tiny_run.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def base(config_file) -> list[object]:
    return ["--config", config_file, "--checkpoint", config_file.parent / "base"]


def contents(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in FILES}


def summary_of(directory: Path) -> dict:
    return json.loads((directory / reports.SUMMARY).read_text())


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


@pytest.mark.parametrize("samples", [1, 3, 5])
def test_pass_at_is_the_share_of_draws_that_hold_a_right_sample(samples):
    for k, correct in itertools.product(range(1, samples + 1), range(samples + 1)):
        draws = list(itertools.combinations(range(samples), k))
        share = sum(any(index < correct for index in draw) for draw in draws) / len(draws)
        assert statistics.pass_at(np.array([correct]), samples, k)[0] == pytest.approx(share, abs=1e-12)


def test_paired_difference_and_exact_mcnemar():
    first = np.array([1, 1, 1, 1, 1, 0, 0, 1], float)
    second = np.array([0, 0, 0, 0, 1, 0, 1, 1], float)
    found = statistics.paired(first, second)
    assert (found["mean"], found["better"], found["worse"]) == (0.375, 4, 1)
    # Five discordant items, four or more of them one way: twice the tail of a fair coin.
    assert found["p"] == pytest.approx(2 * sum(math.comb(5, k) for k in (4, 5)) / 2**5)
    half = 2.3646 * np.std(first - second, ddof=1) / math.sqrt(8)
    assert found["high"] - found["mean"] == pytest.approx(half, rel=1e-4)
    assert statistics.paired(first, first)["p"] == 1.0
    assert statistics.paired(first / 2, second)["p"] is None


def test_checksum_sees_one_bit_and_an_exchange():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    changed, exchanged = x.copy(), x.copy()
    changed[1, 2] = np.nextafter(x[1, 2], np.float32(9))
    exchanged[0, 0], exchanged[0, 1] = x[0, 1], x[0, 0]
    sums = [int(transfer.checksum({"w": value})[0]) for value in (x, x.copy(), changed, exchanged)]
    assert sums[0] == sums[1] and len(set(sums)) == 3


# ----------------------------------------------------------------------------------------------------------------------
# The command


def test_tasks_by_lengths_from_files(config_file, base, tmp_path):
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"input": "3,5,7", "output": "22"}\n' * 3)
    tasks = f"tiny_run:TASK,countdown={problems}"
    keep_last = ["--config.overlong_prompts=keep_last", "--lengths=4,8"]
    tiny_run.command(evaluate, *base, *keep_last, "--tasks", tasks, "--count", 3, "--output", tmp_path / "out")
    results = summary_of(tmp_path / "out")["results"]
    shapes = [(r["task"], r["rows"], r["count"], r["completion_length"], r["steps"]) for r in results]
    expected = [("even", "test", 3), ("countdown", str(problems), 3)]
    assert shapes == [(*one, length, length // 2) for one in expected for length in (4, 8)]
    lines = (tmp_path / "out" / reports.TABLE).read_text().splitlines()
    assert "| task | metric | 4 (2) | 8 (4) |" in lines
    assert [line.split(" | ")[:2] for line in lines[4:] if line.startswith("|")] == [
        ["| even", "cells"], ["| even", "puzzles"], ["| countdown", "accuracy"], ["| countdown", "accuracy (public)"],
    ]  # fmt: skip
    records = [json.loads(line) for line in (tmp_path / "out" / reports.COMPLETIONS).read_text().splitlines()]
    assert len(records) == 12 and records[-1]["target"] == 22 and "completion" in records[-1]
    for result in results:
        own = [r for r in records if all(r[key] == result[key] for key in ("task", "completion_length"))]
        for name, value in result["metrics"].items():
            values = [record[name] for record in own]
            assert value["mean"] == pytest.approx(np.mean(values))
            assert value["error"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(3))
    assert (tmp_path / "out" / reports.FIGURE).read_bytes().startswith(b"\x89PNG")


def test_a_file_is_drawn_down_to_the_rows_of_the_papers(config_file, base, tmp_path):
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(f'{{"input": "3,5,7", "output": "{n}"}}\n' for n in range(1, 301)))
    arguments = [*base, "--config.overlong_prompts=keep_last", "--config.evaluation.batch_rows=256"]
    tiny_run.command(evaluate, *arguments, f"--tasks=countdown={problems}", "--lengths=4", "--output", tmp_path / "out")
    records = [json.loads(line) for line in (tmp_path / "out" / reports.COMPLETIONS).read_text().splitlines()]
    assert len({record["target"] for record in records}) == len(records) == 256


def test_sampling_and_pass_at(base, tmp_path):
    arguments = [*base, "--count=4", "--samples=3", "--temperature=1", "--pass_at=1,3"]
    tiny_run.command(evaluate, *arguments, "--output", tmp_path)
    records = [json.loads(line) for line in (tmp_path / reports.COMPLETIONS).read_text().splitlines()]
    assert [record["item"] for record in records] == [item for item in range(4) for _ in range(3)]
    assert len({record["completion"] for record in records if record["item"] == 0}) > 1
    metrics = summary_of(tmp_path)["results"][0]["metrics"]
    assert list(metrics) == ["cells", "puzzles", "puzzles pass@1", "puzzles pass@3"]
    cells = np.array([record["cells"] for record in records]).reshape(4, 3).mean(axis=1)
    assert metrics["cells"]["error"] == pytest.approx(np.std(cells, ddof=1) / 2)


def test_brackets_in_names_are_shown_as_they_are():
    result = {"task": "even", "completion_length": 4, "steps": 2, "count": 1, "rows": "[b]rows[/x].jsonl"}
    result |= {"metrics": {"right [strict]": {"mean": 1.0, "error": 0.0}}}
    summary = {"adapter": "a[/b]", "checkpoint": "c", "workdir": None, "strategy": "random", "temperature": 0.0}
    console = Console(width=100, file=io.StringIO())
    console.print(reports.table(summary | {"samples": 1, "results": [result]}))
    shown = " ".join(console.file.getvalue().split())
    assert all(text in shown for text in ("[b]rows[/x].jsonl", "right [strict]", "a[/b]"))


def test_evaluations_by_different_graders_are_not_compared(tmp_path):
    for grader in ("robust", "public"):
        entry = {"task": "t", "completion_length": 4, "items": "i", "metrics": {"right": {"mean": 1.0, "error": 0.0}}}
        (tmp_path / grader).mkdir()
        reports.write_json(tmp_path / grader / reports.SUMMARY, {"grader": grader, "results": [entry]})
    with pytest.raises(UserError, match="'robust' and .* by 'public': evaluate one of them anew"):
        reports.compare_evaluations(tmp_path / "robust", tmp_path / "public")


def test_a_table_is_divided_on_terminals_only(monkeypatch):
    for options, lines in (({}, 1), ({"force_terminal": True}, 2)):
        console = Console(width=20, file=io.StringIO(), **options)
        console.text("| a | [b]table[/b] of 30 columns |")
        assert len(console.file.getvalue().splitlines()) == lines
    monkeypatch.setenv("COLUMNS", "0")
    assert Console(file=io.StringIO()).width == 80


def test_the_directory_is_reserved_until_its_files_are_complete(base, tmp_path, monkeypatch):
    def write(*arguments, original=reports.write):
        with pytest.raises(UserError, match="in use by process"):
            Lock(tmp_path, "--output")
        original(*arguments)

    monkeypatch.setattr(reports, "write", write)
    tiny_run.command(evaluate, *base, "--count=2", "--output", tmp_path)
    assert summary_of(tmp_path)["results"] and not (tmp_path / ".lock").exists()


def killed(arguments: list[object], output: Path) -> int:
    """Starts the command, kills it once two batches are on disk, and returns its exit code."""
    line = [sys.executable, "-m", "gdsd_jax.evaluate", *map(str, arguments), "--output", str(output)]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ["PYTHONPATH"]])
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": path})
    try:
        end, part = time.monotonic() + 600, output / UNFINISHED
        while not (part.exists() and part.read_bytes().count(b"\n") >= 3):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        return process.wait(timeout=60)
    finally:
        process.kill()


@pytest.mark.slow
def test_killed_and_resumed_ends_with_the_same_files(config_file, base, tmp_path, capsys):
    arguments = [*base, "--count=200", "--config.evaluation.batch_rows=1", "--lengths=4,8"]
    assert killed(arguments, tmp_path / "killed") == -signal.SIGKILL
    part = tmp_path / "killed" / UNFINISHED
    assert not (tmp_path / "killed" / reports.SUMMARY).exists()
    left = part.read_bytes()
    assert left.count(b"\n") < 1 + 2 * 200
    # As a kill in the middle of a line leaves it.
    part.write_bytes(left + b'{"part": "even 8", "te')

    with pytest.raises(SystemExit):
        tiny_run.command(evaluate, *arguments, "--config.seed=3", "--output", tmp_path / "killed")
    assert "another seed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tiny_run.command(evaluate, *arguments, "--steps=1", "--output", tmp_path / "killed")
    assert "another even 4" in capsys.readouterr().err
    assert part.read_bytes().startswith(left)

    tiny_run.command(evaluate, *arguments, "--output", tmp_path / "killed")
    tiny_run.command(evaluate, *arguments, "--output", tmp_path / "whole")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not part.exists()


@pytest.mark.slow
def test_best_checkpoint_is_kept_evaluated_and_compared(config_file, tmp_path, monkeypatch, capsys):
    # What the three evaluations of the run are made to say: the second is best.
    said = iter([0.2, 0.7, 0.7])
    original = train.evaluate_policy
    monkeypatch.setattr(train, "evaluate_policy", lambda *a, **k: original(*a, **k) | {"cells": next(said)})
    run = ["--config", config_file, "--workdir", tmp_path / "run", "--config.iterations=3"]
    settings = ["--config.evaluation.every=1", "--config.evaluation.best=cells"]
    tiny_run.command(train, *run, *settings)
    assert [path.name for path in (tmp_path / "run" / "best").iterdir() if path.name.isdigit()] == ["2"]

    tiny_run.command(evaluate, *run, "--best", "--output", tmp_path / "best")
    tiny_run.command(evaluate, *run, "--output", tmp_path / "newest")
    assert [summary_of(tmp_path / name)["iteration"] for name in ("best", "newest")] == [2, 3]
    config, _, _ = parse(["test", *map(str, ["--config", config_file])], {})
    policies = [load_policy(config, tmp_path / "run", best=best) for best in (True, False)]
    kept, newest = (jax.tree.leaves(policy.lora) for policy in policies)
    assert any((a != b).any() for a, b in zip(kept, newest, strict=True))

    (legend,) = {line for line in capsys.readouterr().out.splitlines() if "(denoising steps)" in line}
    assert "standard error" in legend and len(legend) <= 80
    tiny_run.command(evaluate, *run, "--output", tmp_path / "best", "--compare", tmp_path / "newest")
    assert "95 % interval" in capsys.readouterr().out
    (found, *_) = json.loads((tmp_path / "best" / "comparison.json").read_text())["results"]
    means = [summary_of(tmp_path / name)["results"][0]["metrics"]["cells"]["mean"] for name in ("best", "newest")]
    assert (found["metric"], found["this"], found["other"]) == ("cells", *map(pytest.approx, means))
    assert found["difference"]["mean"] == pytest.approx(means[0] - means[1], abs=1e-6)

    tiny_run.command(evaluate, *run, "--count=4", "--output", tmp_path / "fewer")
    with pytest.raises(SystemExit):
        tiny_run.command(evaluate, *run, "--output", tmp_path / "best", "--compare", tmp_path / "fewer")
    assert "not evaluated on the same rows" in capsys.readouterr().err
