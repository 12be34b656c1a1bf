"""Draws the figure of a comparison of methods: rewards, evaluations and final values."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gdsd_jax.telemetry.plots import COLOURS, literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(path: Path, table: dict[str, Any], curves: dict[str, list], split: str) -> None:
    """Draws rewards and evaluations over iterations (mean and range over seeds), and the final values.

    Args:
      table: the table that `write_report` writes.
      curves: by method, the records of `metrics.jsonl` of each of its runs.
      split: the split on which the runs were evaluated during training.
    """
    # Imported only here, because Matplotlib takes a second to import.
    from matplotlib.figure import Figure

    metric = f"eval/{table['metric']}"
    # If there are more methods than colours, the colours repeat with dashed lines.
    looks = [(colour, line) for line in ("-", "--") for colour in COLOURS]
    figure = Figure(figsize=(13, 4.6), layout="constrained", dpi=130)
    left, middle, right = figure.subplots(1, 3, width_ratios=(5, 5, 3))
    for index, (row, runs) in enumerate(zip(table["methods"], curves.values(), strict=True)):
        colour, line = looks[index % len(looks)]
        style = {"color": colour, "linestyle": line, "label": row["method"], "linewidth": 1.8}
        _curve(left, runs, "reward/mean", style, smooth=True)
        _curve(middle, runs, metric, style | {"marker": "o", "markersize": 4}, scale=100)
        _final(right, index, row, colour)
    start = 100 * table["start"]["mean"]
    right.axvline(start, color="0.35", linewidth=1, linestyle=":")
    right.annotate("start", (start, 1), (3, -3), xycoords=("data", "axes fraction"), textcoords="offset points",
                   va="top", fontsize=8, color="0.35")  # fmt: skip
    names = [row["method"] for row in table["methods"]]
    right.set_yticks(range(len(names)), names, fontsize=9)
    right.set_ylim(len(names) - 0.4, -0.8)
    # The values of the seeds set the scale, because an interval from few seeds may reach far beyond them.
    shown = [start, *(100 * run["final"] for row in table["methods"] for run in row["runs"])]
    margin = max(0.15 * (max(shown) - min(shown)), 2)
    right.set_xlim(min(shown) - margin, max(shown) + margin)
    name = literal(table["metric"])
    titles = ("Reward of the rollouts (running mean)", f"Greedy, {split} split", "Final, with 95 % interval")
    for axes, title in zip((left, middle, right), titles, strict=True):
        axes.set_title(title, fontsize=11, loc="left")
        axes.tick_params(labelsize=9)
        axes.grid(alpha=0.3, linewidth=0.6, axis="x" if axes is right else "both")
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("mean reward", fontsize=9)
    middle.set_ylabel(f"{name} (%)", fontsize=9)
    right.set_xlabel(f"{name}, {table['split']} (%)", fontsize=9)
    for axes in (left, middle):
        axes.set_xlim(left.get_xlim())
        axes.set_xlabel("iteration", fontsize=9)
        axes.locator_params(axis="x", integer=True, nbins=8)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8), fontsize=9, frameon=False)
    counts = sorted({len(runs) for runs in curves.values()})
    seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    task, plural = literal(table["task"]), "" if seeds == "1" else "s"
    figure.suptitle(f"{task}: mean and range over {seeds} seed{plural}", fontsize=12)
    figure.savefig(path, format="png")


def _curve(
    axes: Axes, runs: list[list[dict]], name: str, style: dict[str, Any], *, scale: float = 1, smooth: bool = False
) -> None:
    """Draws the mean, and behind it the range, over the runs that have a value at each step."""
    steps = sorted({entry["step"] for entries in runs for entry in entries if entry.get(name) is not None})
    if not steps:
        axes.plot([], [], **style)
        return
    # Without the running mean, noise between iterations, mostly of the prompts, would hide the methods' differences.
    width = 2 * (len(steps) // 10) + 1 if smooth else 1
    table = np.full((len(runs), len(steps)), np.nan)
    for row, entries in zip(table, runs, strict=True):
        found = {entry["step"]: entry[name] for entry in entries if entry.get(name) is not None}
        values = np.asarray([scale * found.get(step, np.nan) for step in steps])
        for i in np.flatnonzero(np.isfinite(values)):
            row[i] = np.nanmean(values[max(0, i - width // 2) : i + width // 2 + 1])
    axes.fill_between(steps, np.nanmin(table, 0), np.nanmax(table, 0), color=style["color"], alpha=0.13, linewidth=0)
    axes.plot(steps, np.nanmean(table, 0), **style)


def _final(axes: Axes, index: int, row: dict[str, Any], colour: str) -> None:
    """Draws one line of the last panel: the interval, the mean, and each seed, as a cross if its run collapsed."""
    for run in row["runs"]:
        axes.plot(100 * run["final"], index + 0.22, "x" if run["collapsed"] else "o", color=colour, markersize=5,
                  alpha=0.6)  # fmt: skip
    final = row["final"]
    if final["mean"] is None:
        return
    if final["low"] is not None:
        axes.plot([100 * final["low"], 100 * final["high"]], [index, index], color=colour, linewidth=2)
    axes.plot(100 * final["mean"], index, "D", color=colour, markersize=6)
