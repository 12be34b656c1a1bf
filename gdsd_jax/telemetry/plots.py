"""Draws the curves of a run, also while it is still running.

python -m gdsd_jax.telemetry.plots WORKDIR                           draws all metrics to WORKDIR/curves.png
python -m gdsd_jax.telemetry.plots WORKDIR reward/mean eval/puzzles  draws only these metrics
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gdsd_jax.runtime import front
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.files import replacing, understood
from gdsd_jax.telemetry.metrics import METRICS, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES = "curves.png"


class Panel(NamedTuple):
    """A panel of `curves.png`.

    title, label: of the panel and of its vertical axis.
    names: metrics of the panel, in this order.
    prefix: instead of names, the panel has all metrics that begin with it and that no other panel names.
    floor, ceiling: ends of the vertical axis; None: they follow from the values.
    log: whether the vertical axis may be logarithmic.
    smooth: whether long curves get a running mean.
    typical: whether the axis ends at three times the median, because compilation makes the first step far slower.
    """

    title: str
    label: str
    names: tuple[str, ...] = ()
    prefix: str = ""
    floor: float | None = None
    ceiling: float | None = None
    log: bool = False
    smooth: bool = True
    typical: bool = False


PANELS = (
    Panel("Reward of the rollouts", "reward", ("reward/mean",)),
    Panel("Evaluation", "metric", prefix="eval/", floor=0.0),
    Panel("Reward components", "mean", prefix="reward/"),
    Panel("Loss", "loss", ("loss",)),
    Panel("Clipped scores", "share", ("policy/clipped",), floor=0.0),
    Panel("Divergence from the reference", "KL (nats)", ("policy/kl",)),
    Panel("Entropy of the policy", "nats per token", ("policy/entropy",), floor=0.0),
    Panel("Score spread across views", "standard deviation (nats)", ("policy/score_spread",), floor=0.0),
    Panel("Gradient norm", "norm before clipping", ("grad/norm",), log=True),
    Panel("Gradient signal-to-noise", "ratio", ("grad/signal_to_noise",)),
    Panel("Groups that teach nothing", "share", ("reward/zero_spread",), floor=0.0, ceiling=1.0),
    Panel("Diversity inside groups", "distinct share", ("completion/diversity",), floor=0.0),
    Panel("Completion length", "tokens", ("completion/length",), floor=0.0),
    Panel("Learning rate", "rate", ("lr",), floor=0.0, smooth=False),
    Panel("Rewards that were NaN or raised", "count", ("reward/nan",), floor=0.0),
    Panel("Other metrics of the objective", "mean", prefix="policy/"),
    Panel(
        "Seconds per iteration",
        "seconds",
        ("time/iteration", "time/rollout", "time/reward", "time/update"),
        floor=0.0,
        smooth=False,
        typical=True,
    ),
    Panel("Throughput", "tokens per second", ("time/tokens_per_second",), floor=0.0),
)

# The metric that is drawn as a band around reward/mean.
SPREAD = "reward/std"
# Okabe and Ito's colours, distinct for colour-blind eyes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Of the first curves of a panel, one for each colour, then of the next ones.
LINES = ("-", "--", ":", "-.")


def plot_curves(workdir: str | os.PathLike, only: Sequence[str] = ()) -> Path:
    """Draws `workdir/curves.png` from `workdir/metrics.jsonl`, with a panel for each kind of metric that was logged.

    Noisy curves of more than 60 points are drawn faint, below their running mean over a twentieth of the points.

    Args:
      only: names of the metrics to draw, also of those that no panel of `PANELS` shows; if empty, all panels are drawn.

    Returns:
      The path of the picture.

    Raises:
      UserError: there are no metrics to draw, or a name of `only` is none of them.
    """
    # Imported only here, because Matplotlib takes a second to import.
    from matplotlib.figure import Figure

    entries = read_metrics(workdir)
    names = sorted({name for entry in entries for name in entry} - {"step"})
    with understood(Path(workdir) / METRICS, "repair the line or move the file away"):
        series = {name: _series(entries, name) for name in names}
    series = {name: points for name, points in series.items() if np.isfinite(points[1]).any()}
    unknown = sorted(set(only) - set(series))
    if unknown:
        raise UserError(f"{Path(workdir) / METRICS} holds no {unknown[0]}: it holds {', '.join(series)}")
    claimed = {name for panel in PANELS for name in panel.names} | {SPREAD}
    drawn = []
    for panel in PANELS:
        wanted = panel.names or sorted(n for n in series if n.startswith(panel.prefix) and n not in claimed)
        present = [name for name in wanted if name in series and (not only or name in only)]
        # The panel of failed rewards is left out if none failed.
        if present and not (present == ["reward/nan"] and not np.nansum(series["reward/nan"][1])):
            drawn.append((panel, present))
    shown = {name for _, present in drawn for name in present}
    drawn += [(Panel(name, name.rpartition("/")[2], (name,)), [name]) for name in only if name not in shown]
    if not drawn:
        raise UserError(f"{Path(workdir) / METRICS} holds none of the metrics that are drawn")

    columns = min(4 if len(drawn) > 9 else 3, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    first, last = (pick(entry["step"] for entry in entries) for pick in (min, max))
    margin = 0.03 * max(last - first, 1)
    width, height = 4.4 * columns, 3.1 * rows + 0.4
    figure = Figure(figsize=(width, height), dpi=110)
    # Margins in inches. A layout that Matplotlib computes would draw everything twice, which takes a second.
    figure.subplots_adjust(0.7 / width, 0.5 / height, 1 - 0.15 / width, 1 - 0.75 / height, wspace=0.26, hspace=0.3)
    figure.suptitle(literal(f"{Path(workdir).resolve().name}: step {last}"))
    for index, (panel, present) in enumerate(drawn):
        axes = figure.add_subplot(rows, columns, index + 1)
        _draw(axes, panel, {name: series[name] for name in present}, series.get(SPREAD))
        axes.set_xlim(first - margin, last + margin)
        # Only the lowest panel of each column has a label on its horizontal axis.
        if index + columns >= len(drawn):
            axes.set_xlabel("step")
    path = Path(workdir) / CURVES
    with replacing(path) as draft:
        figure.savefig(draft, format="png")
    return path


def literal(text: str) -> str:
    """Returns a text that Matplotlib draws as it is given; a formula between dollar signs might not parse."""
    return text.replace("$", r"\$")


def _series(entries: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps and values of one metric, `[N]` each; null becomes NaN, which leaves a gap in the curve."""
    points = [(entry["step"], entry[name]) for entry in entries if name in entry]
    steps, values = zip(*points, strict=True)
    found = np.asarray([np.nan if v is None else v for v in values], float)
    # The ends of an axis must not lie further apart than the largest float.
    return np.asarray(steps, float), np.where(np.isfinite(found), np.clip(found, -1e300, 1e300), np.nan)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Computes the mean of the finite values in a centred window, which shrinks at both ends."""
    kernel = np.ones(width)
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), kernel, mode="same")
    count = np.convolve(finite.astype(float), kernel, mode="same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _draw(
    axes: Axes,
    panel: Panel,
    series: dict[str, tuple[np.ndarray, np.ndarray]],
    spread: tuple[np.ndarray, np.ndarray] | None,
) -> None:
    for index, (name, (steps, values)) in enumerate(series.items()):
        colour, line = COLOURS[index % len(COLOURS)], LINES[index // len(COLOURS) % len(LINES)]
        label = literal(name.rsplit("/", 1)[-1].replace("_", " "))
        marker = "o" if len(steps) <= 30 else None
        if panel.smooth and len(steps) > 60:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            values = _running_mean(values, 2 * (len(values) // 40) + 1)
        axes.plot(steps, values, line, color=colour, linewidth=1.6, marker=marker, markersize=3, label=label)
        if name == "reward/mean" and spread is not None:
            width = np.interp(steps, *spread)
            axes.fill_between(steps, values - width, values + width, color=colour, alpha=0.15, linewidth=0)
    axes.set_title(literal(panel.title), fontsize=11)
    axes.set_ylabel(literal(panel.label), fontsize=9)
    axes.tick_params(labelsize=8)
    axes.locator_params(axis="x", integer=True, nbins=6)
    finite = np.concatenate([values[np.isfinite(values)] for _, values in series.values()])
    if panel.log and finite.min() > 0 and finite.max() > 20 * finite.min():
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))
        top = max(float(np.nanmedian(values)) for _, values in series.values()) * 3 if panel.typical else np.inf
        top = 1.06 * min(top, finite.max()) if panel.ceiling is None else panel.ceiling
        if panel.floor is not None and top > panel.floor:
            axes.set_ylim(panel.floor, top)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        axes.legend(fontsize=8, framealpha=0.7)


def main(arguments: list[str]) -> None:
    """Draws the curves of one run and prints the path of the picture, or explains itself.

    Raises:
      UserError: no directory is given, or it holds no metrics to draw.
    """
    if front.HELP & set(arguments):
        print((__doc__ or "").strip())
        return
    if not arguments or any(argument.startswith("-") for argument in arguments):
        raise UserError("usage: python -m gdsd_jax.telemetry.plots WORKDIR [METRIC ...]")
    print(plot_curves(arguments[0], arguments[1:]))


if __name__ == "__main__":
    front.run(lambda: main(sys.argv[1:]))
