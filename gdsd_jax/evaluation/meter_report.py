"""Writes the meter's table as JSON, Markdown and a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gdsd_jax.evaluation import reports
from gdsd_jax.runtime.files import plain, replacing, write_json, write_text

JSON, TABLE, FIGURE = "meter.json", "meter.md", "meter.png"


def write(directory: Path, table: dict[str, Any]) -> None:
    """Writes the table as JSON and Markdown, and the figure, each atomically."""
    directory.mkdir(parents=True, exist_ok=True)
    table = plain(table)
    write_json(directory / JSON, table)
    write_text(directory / TABLE, markdown(table))
    with replacing(directory / FIGURE) as draft:
        draw(draft, table)


def markdown(table: dict[str, Any], width: int | None = None) -> str:
    """Formats the tables in Markdown, after a paragraph about the rollouts that were measured.

    Args:
      table: that of `gdsd_jax.evaluation.probe.measure`, or the content of `meter.json`.
      width: the number of characters in a line of the terminal: the columns of a wider table are divided among several
        tables, one below the other, which all begin with the methods. None divides none.
    """
    table = plain(table)
    distances = [str(d) for d in table["distances"]]
    about = (
        f"{table['rows']} rollouts of {table['source']}, mean reward {table['reward']:.3f}, mean exact log-probability "
        f"{table['log_prob']:.2f} nats; {100 * table['impossible']:.2g} % cannot be replayed (rounding). "
        f"{table['draws']} draws of masks.\n\n"
        + "\n".join(
            f"Moved to a smooth log-ratio of {d}: the exact one of {100 * table['jumped'][d]:.0f} % of the rollouts "
            f"has jumped, and its median size is {_number(table['log_ratio'][d], 1, '.3g')}."
            for d in distances
        )
    )
    header = ["method", "bias", "spread", "noise", "rank", *(f"error at {d}" for d in distances)]
    header += [*(f"corr. at {d}" for d in distances), "cosine", "of mean"]
    lines = [
        [
            label,
            _number(row["bias"], 1, "+.2f"),
            *(_number(row[name], 1, ".2f") for name in ("spread", "noise", "rank_correlation")),
            *(_number(row["log_ratio"][d]["error"], 100, ".0f") for d in distances),
            *(_number(row["log_ratio"][d]["correlation"], 1, ".2f") for d in distances),
            *(_number(row[name], 1, ".3f") for name in ("cosine", "cosine_of_mean")),
        ]
        for label, row in table["methods"].items()
    ]
    parts = [about, *_fitting(header, lines, width)]
    if "enumerated" in table:
        parts.append("KL to the optimum in the toy language: before the first update, the least, and after the last.")
        header = ["denoiser", "order", "method", "clip", "start", "least", "end", "reward"]
        lines = [
            [
                "trained" if run["trained"] else "random",
                run["strategy"],
                run["method"],
                "yes" if run["clip"] else "no",
                *(f"{value:.3f}" for value in (run["kl"][0], min(run["kl"]), run["kl"][-1])),
                f"{run['reward'][0]:.2f} -> {run['reward'][-1]:.2f}",
            ]
            for run in table["enumerated"]
        ]
        parts += _fitting(header, lines, width)
    return "\n\n".join(parts) + "\n"


def _fitting(header: list[str], lines: list[list[str]], width: int | None) -> list[str]:
    """Returns a table in Markdown, or several that repeat its first column and have lines of at most `width`."""
    columns = list(zip(header, *lines, strict=True))
    sizes = [max(map(len, column)) + 3 for column in columns]  # with " | "
    groups: list[list[int]] = [[0]]
    for number in range(1, len(columns)):
        taken = 1 + sum(sizes[one] for one in groups[-1])
        if width is not None and len(groups[-1]) > 1 and taken + sizes[number] > width:
            groups.append([0])
        groups[-1].append(number)
    tables = []
    for group in groups:
        head, *body = ([line[number] for number in group] for line in (header, *lines))
        tables.append(reports.markdown(head, body, left=len(head), padded=True))
    return tables


def _number(value: float | None, scale: float, form: str) -> str:
    """Formats a number, in percent if the scale is 100; None becomes a dash."""
    return "-" if value is None else format(scale * value, form) + (" %" if scale == 100 else "")


def draw(path: Path, table: dict[str, Any]) -> None:
    """Draws bias and spread, errors of log-ratios and cosines, and below them the KL to the optimum over updates."""
    # Imported only here, because Matplotlib takes a second to import.
    from matplotlib.figure import Figure

    runs = table.get("enumerated", [])
    places = list(dict.fromkeys((run["trained"], run["strategy"]) for run in runs))
    figure = Figure(figsize=(13, 8.4 if runs else 4.4), layout="constrained", dpi=110)
    above, *below = figure.subfigures(2 if runs else 1, 1, squeeze=False)[:, 0]
    left, middle, right = above.subplots(1, 3, sharey=True)
    labels, rows = list(table["methods"]), list(table["methods"].values())
    column = lambda name: [np.nan if row[name] is None else row[name] for row in rows]  # noqa: E731
    heights = range(len(labels))
    left.errorbar(column("bias"), heights, xerr=column("spread"), fmt="o")
    left.set(title="Estimate less exact log-probability (nats)", yticks=heights, yticklabels=labels)
    left.invert_yaxis()
    left.axvline(0, color="0.5", linewidth=1)
    for distance in map(str, table["distances"]):
        found = (row["log_ratio"][distance]["error"] for row in rows)
        errors = [np.nan if error is None else max(100 * error, 1e-2) for error in found]
        middle.plot(errors, heights, "o", label=f"at {distance}")
    middle.set(title="Error of the log-ratio (%)", xscale="log")
    middle.legend(fontsize=8)
    right.plot(column("cosine"), heights, "o", label="one draw of masks")
    right.plot(column("cosine_of_mean"), heights, "s", label="mean of the draws", fillstyle="none")
    right.set(title="Cosine with the exact gradient", xlim=(-0.1, 1.05))
    right.legend(fontsize=8)
    for part in below:
        for axes, (trained, strategy) in zip(part.subplots(1, len(places), squeeze=False)[0], places, strict=True):
            for run in runs:
                if (run["trained"], run["strategy"]) == (trained, strategy):
                    line = "--" if run["clip"] else "-"
                    axes.plot(range(len(run["update"])), run["kl"], line, label=run["method"] + ", clip" * run["clip"])
            axes.set(title=f"{strategy}, {'trained' if trained else 'random'} denoiser", yscale="log")
            axes.set(xlabel="inner updates", xticks=range(len(runs[0]["update"])), xticklabels=runs[0]["update"])
        part.axes[0].set_ylabel("KL to the optimum (nats)")
        part.axes[-1].legend(fontsize=7)
    figure.savefig(path, format="png")
