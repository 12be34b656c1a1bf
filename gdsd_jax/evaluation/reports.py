"""Writes the files of an evaluation (summary, table, figure, completions), and compares two evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import rich.box
import rich.table
from rich.text import Text

from gdsd_jax.evaluation.statistics import paired
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.files import (
    read_object,
    read_objects,
    replacing,
    understood,
    write_json,
    write_json_lines,
    write_text,
)
from gdsd_jax.telemetry.plots import COLOURS, literal

SUMMARY, TABLE, FIGURE, COMPLETIONS = (f"evaluation.{kind}" for kind in ("json", "md", "png", "jsonl"))
UNFINISHED = "evaluation.part.jsonl"  # what has been generated so far; it is removed after the other files are written
COMPARISON = "comparison"
LEGEND = "Columns: completion length (denoising steps). ±: standard error over the rows."


def write(directory: Path, summary: dict[str, Any], records: list[dict]) -> None:
    """Writes the four files, each atomically, the summary last.

    Args:
      summary: the content of `evaluation.json`, see `gdsd_jax.evaluation.run.run`.
      records: one record per completion.
    """
    title, header, body = describe(summary), *_grid(summary)
    write_text(directory / TABLE, f"{title}\n\n{markdown(header, body, left=2)}\n\n{LEGEND}\n")
    with replacing(directory / FIGURE) as draft:
        draw(draft, summary)
    # A comparison reads these two, so they follow each other at once.
    write_json_lines(directory / COMPLETIONS, records)
    write_json(directory / SUMMARY, summary)


def describe(summary: dict[str, Any]) -> str:
    """Returns one line that says which model was evaluated on which rows, and how."""
    model = summary["adapter"] or summary["checkpoint"]
    if summary["workdir"]:
        model = f"{summary['workdir']}, iteration {summary['iteration']}"
    rows = {f"{entry['count']} rows of {entry['task']} ({entry['rows']})": None for entry in summary["results"]}
    how = f"{summary['strategy']}, temperature {summary['temperature']:g}"
    how += f", {summary['samples']} samples each" if summary["samples"] > 1 else ""
    return f"{', '.join(rows)}; {how}; {model}"


def table(summary: dict[str, Any]) -> rich.table.Table:
    """Builds the table for a terminal."""
    header, body = _grid(summary)
    result = rich.table.Table(title=Text(describe(summary)), box=rich.box.SIMPLE_HEAD, title_justify="left")
    for index, name in enumerate(header):
        result.add_column(Text(name), justify="left" if index < 2 else "right")
    for cells in body:
        result.add_row(*map(Text, cells))
    return result


def _grid(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns header and body of the table: one line per task and metric, one column per length."""
    columns = {entry["completion_length"]: entry["steps"] for entry in summary["results"]}
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for entry in summary["results"]:
        for name, value in entry["metrics"].items():
            line = cells.setdefault((entry["task"], name), {})
            line[entry["completion_length"]] = f"{value['mean']:.3f} ± {value['error']:.3f}"
    header = ["task", "metric", *(f"{length} ({steps})" for length, steps in columns.items())]
    return header, [[*names, *(line[length] for length in columns)] for names, line in cells.items()]


def markdown(header: list[str], body: list[list[str]], *, left: int, padded: bool = False) -> str:
    """Formats a Markdown table whose first `left` columns are aligned left and whose others are aligned right.

    With `padded`, spaces align the columns of the text too.
    """
    widths = [max(map(len, column)) if padded else 3 for column in zip(header, *body, strict=True)]
    rule = ["-" * width if n < left else "-" * (width - padded) + ":" for n, width in enumerate(widths)]
    lines = [header, rule, *body]
    if padded:
        lines = [
            [cell.ljust(w) if n < left else cell.rjust(w) for n, (cell, w) in enumerate(zip(line, widths, strict=True))]
            for line in lines
        ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(path: Path, summary: dict[str, Any]) -> None:
    """Draws a panel for each task, with its metrics and their standard errors over the completion length."""
    # Imported only here, because Matplotlib takes a second to import.
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(entry["task"] for entry in summary["results"]))
    columns = min(len(tasks), 3)
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.3 * rows), layout="constrained", dpi=110)
    for index, task in enumerate(tasks):
        axes = figure.add_subplot(rows, columns, index + 1)
        entries = [entry for entry in summary["results"] if entry["task"] == task]
        lengths = [str(entry["completion_length"]) for entry in entries]
        # The KL to the base has another scale and is not drawn.
        names = [name for name in entries[0]["metrics"] if name != "kl"]
        for number, name in enumerate(names):
            found = [entry["metrics"][name] for entry in entries]
            mean, error = ([value[key] for value in found] for key in ("mean", "error"))
            colour = COLOURS[number % len(COLOURS)]
            style = {"color": colour, "marker": "o", "markersize": 4, "capsize": 3, "label": literal(name)}
            axes.errorbar(lengths, mean, yerr=error, **style)
        axes.set_title(literal(task), fontsize=11)
        axes.set_xlabel("completion length", fontsize=9)
        axes.set_ylim(bottom=0.0)
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, framealpha=0.7)
    figure.savefig(path, format="png")


def compare_evaluations(directory: Path, other: Path) -> str:
    """Compares the evaluation in `directory` with the one in `other`, item by item, and returns a table in Markdown.

    The table has the means of both, their difference with its 95 % interval (Student's t over items), and McNemar's
    exact test for metrics that are 0 or 1. It is also written to `directory`, as Markdown and as JSON.

    Raises:
      UserError: one of the two is not a finished evaluation; they have no task and length in common; or their rows
        or graders differ.
    """
    summaries = [_read(place) for place in (directory, other)]
    graders = [summary.get("grader") for summary in summaries]
    if None not in graders and graders[0] != graders[1]:
        raise UserError(
            f"{directory} was judged by the grader {graders[0]!r} and {other} by {graders[1]!r}: evaluate one of them "
            "anew with the other's config.task.grader"
        )
    values = []
    for place, summary in zip((directory, other), summaries, strict=True):
        with understood(place / SUMMARY, "evaluate anew"):
            values.append(_values(place, summary))
            describe(summary)
            if not all(np.isfinite(value).all() for _, found in values[-1].values() for value in found.values()):
                raise ValueError("a value is not a number")
    shared = [key for key in values[0] if key in values[1]]
    if not shared:
        raise UserError(f"{directory} and {other} have no task and length in common")
    found = []
    for task, length in shared:
        (items, ours), (others, theirs) = (each[task, length] for each in values)
        if items != others:
            raise UserError(f"{directory} and {other} were not evaluated on the same rows of {task}")
        for name in (name for name in ours if name in theirs):
            means = {"this": float(ours[name].mean()), "other": float(theirs[name].mean())}
            test = paired(ours[name], theirs[name])
            found.append({"task": task, "completion_length": length, "metric": name, **means, "difference": test})
    header = ["task", "length", "metric", "this", "other", "difference", "95 % interval", "better", "worse", "p"]
    body = [_compared(line) for line in found]
    titles = f"this: {describe(summaries[0])}\n\nother: {describe(summaries[1])}"
    legend = (
        "better, worse: items on which this does better or worse. p: McNemar's exact test, of metrics that are 0 or 1."
    )
    text = f"{titles}\n\n{markdown(header, body, left=3)}\n\n{legend}\n"
    write_json(directory / f"{COMPARISON}.json", {"other": str(other), "results": found})
    write_text(directory / f"{COMPARISON}.md", text)
    return text


def _compared(line: dict[str, Any]) -> list[str]:
    test = line["difference"]
    bounds = "-" if test["low"] is None else f"{test['low']:+.3f} to {test['high']:+.3f}"
    p = "-" if test["p"] is None else f"{test['p']:.2g}"
    names = [line["task"], str(line["completion_length"]), line["metric"]]
    values = [f"{line['this']:.3f}", f"{line['other']:.3f}", f"{test['mean']:+.3f}", bounds]
    return [*names, *values, str(test["better"]), str(test["worse"]), p]


def _read(directory: Path) -> dict[str, Any]:
    path = directory / SUMMARY
    if not path.is_file():
        raise UserError(f"{directory} holds no finished evaluation: run gdsd_jax.evaluate with it as --output first")
    return read_object(path, "evaluate anew")


def _values(directory: Path, summary: dict[str, Any]) -> dict[tuple[str, int], tuple[str, dict[str, np.ndarray]]]:
    """Returns, by task and length, the digest of the items and each metric's mean over samples, `[items]`."""
    records = read_objects(directory / COMPLETIONS, "evaluate anew")
    found = {}
    for entry in summary["results"]:
        key = entry["task"], entry["completion_length"]
        own = [record for record in records if (record["task"], record["completion_length"]) == key]
        names = [name for name in entry["metrics"] if name in own[0]]
        means = {
            name: np.array([record[name] for record in own]).reshape(entry["count"], -1).mean(axis=1) for name in names
        }
        found[key] = entry["items"], means
    return found
