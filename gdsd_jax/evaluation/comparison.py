"""Reports the outcomes of a comparison of methods: a table with one row per method, as JSON and Markdown, and a figure.

A comparison (`gdsd_jax.compare`) has one run for each method and seed.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gdsd_jax.config import TrainConfig, greedy_sampler, to_dict
from gdsd_jax.evaluation import reports
from gdsd_jax.evaluation.comparison_figure import draw
from gdsd_jax.evaluation.statistics import interval
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.files import read_object, replacing, understood, write_json, write_text
from gdsd_jax.tasks.data import rows_digest
from gdsd_jax.telemetry.metrics import read_metrics
from gdsd_jax.training.setup import evaluated_task, task_rows

TABLE_JSON, TABLE_MD, CURVES = "table.json", "table.md", "curves.png"
# A rank needs at least so many pairs of runs, and a wider interval than this: accuracies are counts of puzzles, so that
# a few differences may all be equal, and then their interval has no width.
FEWEST_PAIRS, NARROWEST = 3, 1e-9
WIDTH = 80  # columns of the Markdown
_ROWS: dict[str, str | None] = {}  # digests of test rows that were read once, by the settings that choose them


def state_of(run: TrainConfig, directory: Path) -> str:
    """Returns "finished", "diverged" (an update was not finite) or "open" (not begun, or not finished)."""
    if (directory / "diverged").is_dir():
        return "diverged"
    # The metrics of the last iteration are written before its checkpoint.
    if not (directory / "checkpoints" / str(run.iterations)).is_dir():
        return "open"
    return "finished" if read_metrics(directory)[-1]["step"] == run.iterations else "open"


def test_result(run: TrainConfig, directory: Path) -> dict[str, Any] | None:
    """Returns the metrics of the finished run on the test split, or None if no evaluation fits the run."""
    return read_result(run, directory / "evaluation", iteration=run.iterations)


def read_result(config: TrainConfig, directory: Path, **expected: Any) -> dict[str, Any] | None:
    """Returns the metrics of the evaluation in `directory`, or None if there is none, or it is unfinished or unfit.

    An evaluation fits if the config would evaluate in the same number of steps, on the same rows, with the same prompt
    and grader, and its summary has the values of `expected`.

    Raises:
      UserError: the summary cannot be read, or a metric is not finite.
    """
    path = directory / reports.SUMMARY
    # An evaluation that was killed between its last file and its end is ended by the next one.
    if not path.is_file() or (directory / reports.UNFINISHED).exists():
        return None
    summary = read_object(path, "remove it")
    with understood(path, "remove it"):
        result = summary["results"][0]
        protocol = {"evaluation_prompt": config.evaluation.evaluation_prompt, "grader": config.task.grader}
        fits = (
            result["steps"] == greedy_sampler(config).steps
            and all(summary.get(name) == value for name, value in expected.items())
            and all(summary.get(name, value) == value for name, value in protocol.items())
            and _same_rows(config, result)
        )
        if not all(np.isfinite([value["mean"], value["error"]]).all() for value in result["metrics"].values()):
            raise ValueError("a metric is not a number")
        return result["metrics"] if fits else None


def _same_rows(config: TrainConfig, result: dict[str, Any]) -> bool:
    """Returns whether an evaluation had the test rows that the config names now, or these cannot be read now."""
    if result.get("items") is None:
        return True
    count = result["count"]
    key = json.dumps([to_dict(config.task), config.evaluation.evaluation_prompt, count], sort_keys=True)
    if key not in _ROWS:
        task = evaluated_task(config)
        try:
            enough = len(task_rows(config.task, task, "test")) >= count
            _ROWS[key] = rows_digest(task_rows(config.task, task, "test", count=count)) if enough else "too few"
        except UserError:
            _ROWS[key] = None
    return _ROWS[key] in (None, result["items"])


def outcome(run: TrainConfig, directory: Path, metric: str, start: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the summary of one run, or None while the run is open or not evaluated.

    The summary holds the final metric on the test split, the best metric during training (on the split of
    `config.evaluation`), the median seconds per iteration, and the KL to the reference
    (`gdsd_jax.evaluation.completions.reference_kl`). A diverged run has no policy left, so its final metric is 0.

    A run has collapsed if it diverged, or if its final metric is below the start by more than two standard errors of
    the difference. `collapsed_at` is then the result of `collapse_step`: None if no evaluation during training saw the
    collapse. It is None for other runs too.

    Args:
      metric: name of one of the task's metrics.
      start: mean and standard error of this metric before training.
    """
    state = state_of(run, directory)
    diverged = state == "diverged"
    result = test_result(run, directory) if state == "finished" else None
    if result is None and not diverged:
        return None
    entries = read_metrics(directory)
    final = {"mean": 0.0, "error": 0.0} if diverged else result[metric]
    curve = _values(entries, f"eval/{metric}")
    best = max(curve, default=None)
    margin = 2 * math.hypot(start["error"], final["error"])
    collapsed = diverged or final["mean"] < start["mean"] - margin
    return {
        "seed": run.seed,
        "iterations": entries[-1]["step"],
        "start": start["mean"],
        "final": final["mean"],
        "final_error": final["error"],
        "best": best,
        "drop": None if best is None else best - final["mean"],
        "seconds_per_iteration": float(np.median(_values(entries, "time/iteration"))),
        "kl": None if diverged else result.get("kl", {}).get("mean"),
        "diverged": diverged,
        "collapsed": collapsed,
        "collapsed_at": collapse_step(entries, f"eval/{metric}") if collapsed else None,
    }


def collapse_step(entries: list[dict], name: str) -> int | None:
    """Returns the step from which on a metric stays below half of its best value so far, or None if it does not."""
    curve = [(entry["step"], entry[name]) for entry in entries if entry.get(name) is not None]
    since, best = None, -math.inf
    for step, value in curve:
        best = max(best, value)
        since = (step if since is None else since) if value < best / 2 else None
    return since


def _values(entries: list[dict], name: str) -> list[float]:
    """Returns the values of a metric in the records that have it."""
    return [entry[name] for entry in entries if entry.get(name) is not None]


def summarise(outcomes: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Returns one row per method from the outcomes of its runs; differences to the first method are paired by seed."""
    first = next(iter(outcomes.values()))
    reference = {run["seed"]: run["final"] for run in first}
    rows = []
    for method, runs in outcomes.items():
        column = lambda name, runs=runs: [run[name] for run in runs if run[name] is not None]  # noqa: E731
        paired = [run["final"] - reference[run["seed"]] for run in runs if run["seed"] in reference]
        difference = None if runs is first else interval(paired) | {"values": paired}
        if difference is not None:
            low, high = difference["low"], difference["high"]
            wide = len(paired) >= FEWEST_PAIRS and high - low > NARROWEST
            difference["excludes_zero"] = wide and (low > 0 or high < 0)
        seconds = column("seconds_per_iteration")
        rows.append(
            {
                "method": method,
                "final": interval(column("final")),
                "best": interval(column("best")),
                "drop": interval(column("drop")),
                "collapsed": sum(run["collapsed"] for run in runs),
                "seconds_per_iteration": float(np.median(seconds)) if seconds else None,
                "kl": interval(column("kl"))["mean"],
                "difference": difference,
                "runs": runs,
            }
        )
    return rows


def write_report(
    config: TrainConfig,
    workdir: Path,
    plan: list[tuple[TrainConfig, Path]],
    methods: Sequence[str],
    metric: str,
    start: dict[str, Any],
    *,
    writer: str = "",
) -> dict[str, Any]:
    """Writes the table and the figure from the runs of the plan that have an outcome, and returns the table.

    Args:
      plan: the config and the directory of every run.
      methods: names of the compared methods, the first of which the others are compared with.
      metric: name of the compared metric.
      start: metrics before training, each with its mean and standard error.
      writer: name of this host, if several hosts write the same files.
    """
    outcomes: dict[str, list] = {method: [] for method in methods}
    curves: dict[str, list] = {method: [] for method in methods}
    for run, directory in plan:
        with understood(directory, "remove its evaluation or, if its metrics are not numbers, the whole run"):
            found = outcome(run, directory, metric, start[metric])
        if found is not None:
            outcomes[run.method].append(found)
            curves[run.method].append(read_metrics(directory))
    table = {
        "task": config.task.name,
        "metric": metric,
        "split": config.task.eval_path or "test",
        "iterations": config.iterations,
        "completions_per_iteration": config.prompts_per_iteration * config.group_size,
        "runs": len(plan),
        "runs_in": sum(map(len, outcomes.values())),
        "start": start[metric],
        "methods": summarise(outcomes),
    }

    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / TABLE_JSON, table, writer=writer)
    write_text(workdir / TABLE_MD, markdown(table), writer=writer)
    if table["runs_in"]:
        with replacing(workdir / CURVES, writer=writer) as draft:
            draw(draft, table, curves, config.evaluation.split)
    return table


def markdown(table: dict[str, Any]) -> str:
    """Formats the table and its legend in Markdown, at most `WIDTH` columns wide unless a method's name is long."""
    rows, first = table["methods"], table["methods"][0]["method"]
    start = table["start"]
    about = (
        f"{table['task']}: {table['metric']} in percent on {table['split']}, before training "
        f"{100 * start['mean']:.1f} (standard error {100 * start['error']:.1f}). "
        f"{table['iterations']} iterations of {table['completions_per_iteration']} completions; "
        f"{table['runs_in']} of {table['runs']} runs are in."
    )
    header = ["method", "final", "best", "lost", "s/it", "KL", f"vs {first}"]
    lines = [
        [
            row["method"],
            _percent(row["final"]),
            _percent(row["best"]),
            f"{row['collapsed']}/{len(row['runs'])}",
            _short(row["seconds_per_iteration"], ".2f"),
            _short(row["kl"], ".2g"),
            _percent(row["difference"], "+.1f") if row["difference"] else "-",
        ]
        for row in rows
    ]
    legend = (
        "Mean over seeds ± half of its 95 % interval (Student's t). best: the highest value during training, on the "
        "evaluation split. lost: runs that collapsed, by a non-finite update (final 0) or to a final value below the "
        f"start by more than two standard errors. vs {first}: difference of the final values, paired by seed. "
        "s/it: median seconds per iteration. KL: of the final policy to the reference, if it has an adapter."
    )
    fill = lambda text: textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)  # noqa: E731
    body = reports.markdown(header, lines, left=1, padded=True)
    return "\n\n".join([fill(about), body, fill(ranks(rows)), fill(legend)]) + "\n"


def ranks(rows: list[dict[str, Any]]) -> str:
    """Returns sentences that rank methods against the first, only those whose paired interval excludes zero."""
    first = rows[0]["method"]
    claims = []
    for row in rows[1:]:
        difference = row["difference"]
        if difference["excludes_zero"]:
            low, high = sorted((abs(difference["low"]), abs(difference["high"])))
            side = "above" if difference["mean"] > 0 else "below"
            claims.append(f"{row['method']} is {side} {first} by {100 * low:.1f} to {100 * high:.1f} points.")
    if len(rows) == 1:
        return "A single method has no rank."
    if not claims:
        return f"No paired interval of {FEWEST_PAIRS} seeds excludes zero: no method is ranked above or below {first}."
    tied = "Between all other pairs no rank is claimed; the intervals are not corrected for their number."
    return " ".join([*claims, tied])


def _short(value: float | None, form: str) -> str:
    """Formats a number; None becomes a dash."""
    return "-" if value is None else format(value, form)


def _percent(value: dict[str, Any], form: str = ".1f") -> str:
    """Formats an interval in percent, as its mean ± half of its width."""
    if value["mean"] is None:
        return "-"
    text = format(100 * value["mean"], form)
    return text if value["low"] is None else f"{text} ± {50 * (value['high'] - value['low']):.1f}"
