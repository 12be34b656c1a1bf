"""The comparison of methods, on runs of two iterations: what it trains, skips and claims."""

import dataclasses
import json
import math
import os
import runpy
import signal
import statistics
from pathlib import Path

import pytest
from surroundings import surroundings  # noqa: F401  (a fixture that acts by itself)
from tiny_run import build, command

from benchmarks import stability
from benchmarks.side_by_side import Arm, Protocol
from gdsd_jax import compare, evaluate, train
from gdsd_jax.config import TrainConfig, freeze, greedy_sampler, read_config
from gdsd_jax.diffusion.sampler import compiled_sample
from gdsd_jax.evaluation import comparison, reports
from gdsd_jax.methods import METHODS as METHODS_OF_LIBRARY
from gdsd_jax.runtime import signals
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.files import write_json
from gdsd_jax.tasks.data import rows_digest
from gdsd_jax.telemetry.metrics import read_metrics
from gdsd_jax.training.setup import evaluated_task

METHODS, SEEDS = ("gdsd", "wd1"), (42, 43)
FLAGS = ("--methods", ",".join(METHODS), "--seeds", 2, "--metric", "cells")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def config(config_file) -> TrainConfig:
    return freeze(TrainConfig, runpy.run_path(str(config_file))["get_config"]())


class Calls(list):
    """Records `(method, seed, number of compiled samplers)` after every call of `train.train`."""

    def __init__(self, patch: pytest.MonkeyPatch):
        original = train.train

        def counted(config, workdir):
            result = original(config, workdir)
            self.append((config.method, config.seed, compiled_sample._cache_size()))
            return result

        patch.setattr(train, "train", counted)


@pytest.fixture(scope="module")
def bench(config_file, tmp_path_factory) -> tuple[Path, Calls, int]:
    """Returns the workdir of a finished comparison, its runs, and the final number of compiled samplers."""
    workdir = tmp_path_factory.mktemp("bench") / "bench"
    with pytest.MonkeyPatch.context() as patch:
        calls = Calls(patch)
        command(compare, "--config", config_file, "--workdir", workdir, *FLAGS)
    return workdir, calls, compiled_sample._cache_size()


def table_of(workdir: Path) -> dict:
    return json.loads((workdir / "table.json").read_text())


@pytest.mark.slow
def test_runs_are_seed_major_and_share_the_compiled_sampler(bench):
    _, calls, compiled = bench
    assert [call[:2] for call in calls] == [(method, seed) for seed in SEEDS for method in METHODS]
    # The second run comes after the first evaluation, and is of another method: nothing is compiled from there on.
    assert calls[1][2] == compiled


@pytest.mark.slow
def test_table_holds_what_the_runs_wrote(bench):
    workdir, _, _ = bench
    table = table_of(workdir)
    read = lambda path: json.loads((path / "evaluation.json").read_text())["results"][0]["metrics"]["cells"]  # noqa: E731
    assert table["start"] == read(workdir / "before")
    assert (table["runs"], table["runs_in"], table["metric"]) == (4, 4, "cells")
    finals = {}
    for row, method in zip(table["methods"], METHODS, strict=True):
        assert row["method"] == method
        entries = {seed: read_metrics(workdir / method / f"seed{seed}") for seed in SEEDS}
        finals[method] = [read(workdir / method / f"seed{seed}" / "evaluation")["mean"] for seed in SEEDS]
        assert [run["seed"] for run in row["runs"]] == list(SEEDS)
        assert [run["final"] for run in row["runs"]] == finals[method]
        # The validation of this config is on the test split, so the last value is the final one.
        assert [run["best"] for run in row["runs"]] == [entries[seed][-1]["eval/cells"] for seed in SEEDS]
        assert row["final"]["mean"] == pytest.approx(statistics.mean(finals[method]))
        seconds = [statistics.median(e["time/iteration"] for e in entries[seed]) for seed in SEEDS]
        assert row["seconds_per_iteration"] == pytest.approx(statistics.median(seconds))
        assert all(run["kl"] > 0 for run in row["runs"])
    difference = table["methods"][1]["difference"]
    assert difference["values"] == [b - a for a, b in zip(finals["gdsd"], finals["wd1"], strict=True)]
    # With two values the half width is t(1 degree of freedom) times half their distance.
    half = 12.706204736 * abs(difference["values"][0] - difference["values"][1]) / 2
    assert difference["high"] - difference["mean"] == pytest.approx(half)


@pytest.mark.slow
def test_report_is_readable_and_drawn(bench):
    workdir, _, _ = bench
    text = (workdir / "table.md").read_text()
    assert max(map(len, text.splitlines())) <= 80
    first = [line.split()[1] for line in text.splitlines() if line.startswith("| ")]
    assert first == ["method", "------", *METHODS]
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(workdir.glob(".*"))


@pytest.mark.slow
def test_a_finished_bench_runs_nothing_and_says_the_same(bench, config_file, monkeypatch, capsys):
    workdir, _, _ = bench
    before = table_of(workdir)
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(evaluate, "run", lambda *_, **__: pytest.fail("evaluated again"))
    # As if the last run had been killed while its picture was drawn.
    picture = workdir / "wd1" / "seed43" / "curves.png"
    picture.rename(picture.with_name(".curves.png"))
    command(compare, "--config", config_file, "--workdir", workdir, *FLAGS)
    assert table_of(workdir) == before
    assert picture.read_bytes().startswith(b"\x89PNG") and not picture.with_name(".curves.png").exists()
    assert "run 4/4: wd1 seed 43 (done before)" in capsys.readouterr().out


@pytest.mark.slow
def test_an_evaluation_that_was_killed_at_its_very_end_is_ended(bench, config_file, monkeypatch):
    """The last act of an evaluation is to remove what it had generated before its files were written."""
    workdir, _, _ = bench
    before, part = table_of(workdir), workdir / "wd1" / "seed43" / "evaluation" / reports.UNFINISHED
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("trained again"))
    part.touch()
    command(compare, "--config", config_file, "--workdir", workdir, *FLAGS)
    assert table_of(workdir) == before and not part.exists()


@pytest.mark.slow
def test_an_open_run_is_taken_up_and_a_share_is_left_to_its_host(config, tmp_path, monkeypatch):
    """Host 1 of 2 has wd1 alone; a stop within the first run ends its share, with a true partial table."""
    started = []
    monkeypatch.setattr(train, "train", lambda run, directory: started.append(directory))
    monkeypatch.setattr(compare, "evaluated_start", lambda *_: {"cells": {"mean": 0.5, "error": 0.1}})
    monkeypatch.setenv(signals.STOPPED, "75")
    with pytest.raises(SystemExit) as stop:
        compare.compare(config, tmp_path, METHODS, 2, metric="cells", host_index=1, host_count=2)
    assert stop.value.code == 75
    table = table_of(tmp_path)
    assert started == [tmp_path / "wd1" / "seed42"]
    assert (table["runs"], table["runs_in"]) == (4, 0)
    assert "0 of 4 runs are in" in (tmp_path / "table.md").read_text()


def test_a_diverged_run_is_collapsed_and_the_bench_goes_on(config, tmp_path, monkeypatch):
    tried = []

    def broken(run, directory):
        tried.append((run.method, run.seed))
        (directory / "diverged").mkdir(parents=True)
        line = {"step": 1, "reward/mean": 0.5, "time/iteration": 1.0, "loss": None}
        (directory / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        raise UserError("the update of iteration 1 is not finite")

    monkeypatch.setattr(train, "train", broken)
    monkeypatch.setattr(compare, "evaluated_start", lambda *_: {"cells": {"mean": 0.5, "error": 0.1}})
    for _ in range(2):
        table = compare.compare(config, tmp_path, METHODS, 2, metric="cells")
    assert len(tried) == 4
    for row in table["methods"]:
        assert (row["collapsed"], row["final"]["mean"], row["best"]["mean"]) == (2, 0.0, None)
    assert "2/2" in (tmp_path / "table.md").read_text()


def test_the_start_is_evaluated_anew_only_if_its_content_changed(config, tmp_path, monkeypatch):
    evaluated = []

    def run(config, *, checkpoint, lengths, output):
        evaluated.append(checkpoint)
        entry = {"steps": greedy_sampler(config).steps, "metrics": {"cells": {"mean": 0.5, "error": 0.1}}}
        summary = {"checkpoint": checkpoint, "base": "content", "iteration": None, "results": [entry]}
        write_json(output / "evaluation.json", summary)

    monkeypatch.setattr(evaluate, "run", run)
    moved = dataclasses.replace(config, checkpoint="moved")
    for run_config, base in ((config, "content"), (config, "content"), (moved, "content"), (moved, "other")):
        assert compare.evaluated_start(run_config, base, tmp_path)["cells"]["mean"] == 0.5
    assert evaluated == [config.checkpoint, "moved"]


def test_an_evaluation_by_another_protocol_is_not_taken(config, tmp_path):
    config = dataclasses.replace(config, task=dataclasses.replace(config.task, eval_path=str(tmp_path / "rows.csv")))
    (tmp_path / "rows.csv").write_text("Puzzle,Solution\n0003130200300401,4213134221343421\n")
    entry = {"steps": greedy_sampler(config).steps, "metrics": {"cells": {"mean": 0.5, "error": 0.1}}}
    rows = evaluated_task(config).rows("test", path=tmp_path / "rows.csv")
    summary = {
        "evaluation_prompt": False,
        "grader": "robust",
        "results": [entry | {"items": rows_digest(rows), "count": 1}],
    }
    write_json(tmp_path / "evaluation.json", summary)
    other_prompt = dataclasses.replace(config.evaluation, evaluation_prompt=True)
    assert comparison.read_result(config, tmp_path) == entry["metrics"]
    assert comparison.read_result(dataclasses.replace(config, evaluation=other_prompt), tmp_path) is None
    write_json(tmp_path / "evaluation.json", summary | {"grader": "public"})
    assert comparison.read_result(config, tmp_path) is None
    write_json(tmp_path / "evaluation.json", summary | {"results": [entry | {"items": "others", "count": 1}]})
    assert comparison.read_result(config, tmp_path) is None
    fewer = {"items": rows_digest(rows), "count": 2}
    write_json(tmp_path / "evaluation.json", summary | {"results": [entry | fewer]})
    assert comparison.read_result(config, tmp_path) is None
    gone = dataclasses.replace(config, task=dataclasses.replace(config.task, eval_path="gone.csv"))
    assert comparison.read_result(gone, tmp_path) == entry["metrics"]


def test_other_errors_of_a_run_end_the_bench(config, tmp_path, monkeypatch):
    def full(run, directory):
        raise UserError("the disk is full")

    monkeypatch.setattr(train, "train", full)
    monkeypatch.setattr(compare, "evaluated_start", lambda *_: {"cells": {"mean": 0.5, "error": 0.1}})
    with pytest.raises(UserError, match="disk"):
        compare.compare(config, tmp_path, METHODS, 1, metric="cells")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ("gdsd", "nope")}, "--methods names an unknown method 'nope'.*spg"),
        ({"methods": ("gdsd", "gdsd_tcl")}, "did you mean gdsd_tlc"),
        ({"methods": ()}, "--methods"),
        ({"methods": ("gdsd", "gdsd")}, "twice"),
        ({"seeds": 0}, "--seeds 0"),
        ({"seeds": 10**11}, "must be at least 1 and at most 10000"),
        ({"metric": "nope"}, "no metric 'nope'.*cells, puzzles"),
        ({"host_index": 2, "host_count": 2}, "--host_index 2"),
    ],
)
def test_bad_input_is_refused_before_any_run(config, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(evaluate, "run", lambda *_, **__: pytest.fail("evaluated"))
    with pytest.raises(UserError, match=message):
        compare.compare(config, tmp_path, **({"methods": METHODS, "seeds": 1} | change))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("optimizer", {"name": "optax:adamw", "settings": {"b1": 1.0}}, "config.optimizer.settings"),
        ("evaluation", {"best": "nope"}, "config.evaluation.best"),
    ],
)
def test_bad_settings_are_refused_before_the_start_is_evaluated(config, tmp_path, monkeypatch, part, change, message):
    monkeypatch.setattr(evaluate, "run", lambda *_, **__: pytest.fail("evaluated"))
    changed = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **change)})
    with pytest.raises(UserError, match=message):
        compare.compare(changed, tmp_path, METHODS, 1, metric="cells")


def test_a_signal_after_the_last_iteration_of_a_run_stops_the_bench(config, tmp_path, monkeypatch):
    def last(run, directory):
        with signals.StopSignal():
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train, "train", last)
    states = iter(["open", *["finished"] * 9])
    monkeypatch.setattr(compare, "state_of", lambda *_: next(states))
    monkeypatch.setattr(compare, "evaluated_start", lambda *_: {"cells": {"mean": 0.5, "error": 0.1}})
    monkeypatch.setattr(compare, "write_report", lambda *_, **__: None)
    monkeypatch.setattr(evaluate, "run", lambda *_, **__: pytest.fail("evaluated"))
    monkeypatch.setattr(signals, "_asked", False)
    with pytest.raises(SystemExit) as stop:
        compare.compare(config, tmp_path, METHODS, 1, metric="cells")
    assert stop.value.code == 0


@pytest.mark.slow
def test_runs_of_another_config_are_refused(bench, config):
    workdir, _, _ = bench
    with pytest.raises(UserError, match="config.group_size"):
        compare.compare(dataclasses.replace(config, group_size=4), workdir, METHODS, 2)
    with pytest.raises(UserError, match="config.settings"):
        compare.compare(dataclasses.replace(config, settings={"wd1": {"positive_only": True}}), workdir, METHODS, 2)


def test_interval_against_tabulated_quantiles():
    """t at 97.5 %: 4.302653 with two degrees of freedom, 2.776445 with four."""
    for values, quantile in (([0.1, 0.4, 0.7], 4.302653), ([1.0, 2.0, 4.0, 8.0, 16.0], 2.776445)):
        found = comparison.interval(values)
        half = quantile * statistics.stdev(values) / math.sqrt(len(values))
        assert found["mean"] == pytest.approx(statistics.mean(values))
        assert (found["low"], found["high"]) == pytest.approx((found["mean"] - half, found["mean"] + half), rel=1e-5)
    assert comparison.interval([0.3]) == {"mean": 0.3, "low": None, "high": None}
    assert comparison.interval([])["mean"] is None


def runs_with(finals: list[float], start: float = 0.3) -> list[dict]:
    shared = {"start": start, "best": 0.9, "drop": 0.1, "seconds_per_iteration": 1.0, "kl": None}
    shared |= {"collapsed": False, "collapsed_at": None}
    return [{"seed": seed, "final": final, **shared} for seed, final in enumerate(finals)]


def test_a_rank_is_claimed_only_where_the_paired_interval_excludes_zero():
    first = [0.5, 0.6, 0.7]
    better, noisy = [0.60, 0.71, 0.80], [0.9, 0.5, 0.8]
    rows = comparison.summarise({"a": runs_with(first), "b": runs_with(better), "c": runs_with(noisy)})
    assert rows[0]["difference"] is None
    assert [row["difference"]["excludes_zero"] for row in rows[1:]] == [True, False]
    # Differences 0.10, 0.11, 0.10: mean 10.33 points, half width 4.302653 * 0.57735 / sqrt(3) = 1.434.
    assert "b is above a by 8.9 to 11.8 points." in comparison.ranks(rows)
    assert "c is" not in comparison.ranks(rows)
    assert "no method is ranked" in comparison.ranks([rows[0], rows[2]])
    # Equal differences have an interval without width, from which no rank follows.
    for finals in ([0.5, 0.6], [0.5, 0.6, 0.7]):
        rows = comparison.summarise({"a": runs_with(finals), "b": runs_with([final + 0.125 for final in finals])})
        assert rows[1]["difference"]["low"] == pytest.approx(0.125)
        assert rows[1]["difference"]["excludes_zero"] is False
    # A seed that the first method lacks has no pair, and one pair alone has no interval.
    rows = comparison.summarise({"a": runs_with(first[:1]), "b": runs_with(better)})
    assert rows[1]["difference"]["values"] == pytest.approx([0.1])
    assert rows[1]["difference"]["excludes_zero"] is False


def test_collapse_is_two_standard_errors_below_the_start(config, tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "time/iteration": 1.0, "eval/cells": 0.4}\n')
    monkeypatch.setattr(comparison, "state_of", lambda *_: "finished")
    start = {"mean": 0.5, "error": 0.03}
    # The error of the difference is hypot(0.03, 0.04) = 0.05.
    for final, collapsed in ((0.401, False), (0.399, True)):
        found = {"cells": {"mean": final, "error": 0.04}}
        monkeypatch.setattr(comparison, "test_result", lambda *_, found=found: found)
        assert comparison.outcome(config, tmp_path, "cells", start)["collapsed"] is collapsed


def test_the_tiny_config_gives_every_method_one_protocol():
    file = Path(__file__).parents[2] / "configs" / "compare_tiny.py"
    config = freeze(TrainConfig, read_config(file))
    compare.require_runnable(config, list(METHODS_OF_LIBRARY), 1, 0, 1)
    assert (config.iterations, config.inner_updates, config.evaluation.count) == (20, 1, 256)
    for name, recipe in METHODS_OF_LIBRARY.items():
        settings = recipe.settings(**config.settings.get(name, {}))
        assert getattr(settings, "beta", 0.0) == 0.0, name
        assert getattr(settings, "views", 1) == getattr(settings, "pairs", 1) == 1, name


@pytest.mark.slow
def test_runs_made_side_by_side_are_those_of_train(config_file, config, tmp_path, monkeypatch):
    """Within rounding: two seeds in one program, and one of them alone. The reports train nothing anew."""
    text = config_file.read_text().replace("inner_updates=1", "inner_updates=2")
    (tmp_path / "config.py").write_text(text)
    config = dataclasses.replace(config, inner_updates=2)
    sizes = {"iterations": None, "at_once": 2}
    bench = tmp_path / "bench"
    protocol, arm = Protocol(tmp_path / "config.py", bench, [0.05], 1, math.inf, **sizes), Arm.of("gdsd=2")
    protocol.share([arm], worker=0)
    runs = [compare.run_config(config, "gdsd", seed, 0.05) for seed in SEEDS]
    train.train(runs[1], tmp_path / "alone")
    together = read_metrics(bench / "own" / "seeds" / "gdsd" / "seed43")
    for ours, theirs in zip(together, read_metrics(tmp_path / "alone"), strict=True):
        shared = [name for name in ours if not name.startswith("time/")]
        assert {"loss", "reward/mean", "policy/log_ratio"} <= set(shared)
        for name in shared:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6), name
    kept = read_metrics(bench / "own" / "tenfold" / "gdsd" / "seed42")
    assert kept[-1]["lr"] == pytest.approx(10 * together[-1]["lr"])
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("all runs are there"))
    table = compare.compare(config, bench / "own" / "seeds", ["gdsd"], 2, metric="cells")
    assert table["runs_in"] == 2
    stability.report(protocol, [arm], "cells")
    reported = json.loads((bench / "report" / "report.json").read_text())
    assert [run["final"] for run in reported["seeds"]["gdsd"]] == [run["final"] for run in table["methods"][0]["runs"]]
    assert [len(reported[part]["gdsd"]) for part in ("tried", "seeds", "tenfold")] == [1, 2, 1]
    assert (bench / "report" / "seeds.png").stat().st_size > 0
