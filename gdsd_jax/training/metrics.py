"""Metrics on disk, progress on the terminal, curves as a picture: all on the host, from numbers already fetched.

`metrics.jsonl` is the record and always written; TensorBoard and Weights & Biases are copies of it for those who ask.
Names have the form `group/name`; everything under `time/` depends on the machine, everything else repeats to the bit.

    python -m gdsd_jax.training.metrics WORKDIR        draws WORKDIR/curves.png anew, also while the run goes on
"""

from __future__ import annotations

import collections
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import rich.console
import rich.progress

from gdsd_jax.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS, COMPLETIONS, CURVES = "metrics.jsonl", "completions.jsonl", "curves.png"

# ----------------------------------------------------------------------------------------------------------------------
# The record


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: NumPy values as Python's, NaN and infinities as null."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def _lines(path: Path) -> list[tuple[bytes, dict]]:
    """The complete lines of a JSONL file with their contents; a last line that a kill cut short is left out."""
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            raise UserError(f"{path}: line {number} is not a record with a step: repair the line or move the file away")
        found.append((line, entry))
    return found


def _cut_back(path: Path, last_step: int | None) -> None:
    """Removes a line cut short and the lines of later steps than `last_step`, all at once or not at all."""
    if not path.exists():
        return
    kept = b"".join(line for line, entry in _lines(path) if last_step is None or entry["step"] <= last_step)
    if len(kept) == path.stat().st_size:
        return
    draft = path.with_name(path.name + ".new")
    with draft.open("wb") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


class MetricWriter:
    """Appends metrics and completions of a run to `workdir`, flushed line by line: a kill loses no written step.

    Args:
      workdir: created when missing.
      tensorboard, wandb: also write to TensorBoard (`workdir/tensorboard`) or to Weights & Biases (project and mode
        from its own environment variables).
      resume_step: the step of the restored checkpoint; lines of later steps are cut away first. -1 starts the files
        anew; None appends to what is there.

    Raises:
      UserError: a copy was asked for whose package is not installed, or a file holds something else than records.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        tensorboard: bool = False,
        wandb: bool = False,
        resume_step: int | None = None,
    ) -> None:
        workdir = Path(workdir)
        # The copies first: whatever is missing for them is reported before a file is touched.
        board = _import_optional("tensorboardX", "tensorboard") if tensorboard else None
        site = _import_optional("wandb", "wandb") if wandb else None
        workdir.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, COMPLETIONS):
            _cut_back(workdir / name, resume_step)
        self._metrics = (workdir / METRICS).open("a", encoding="utf-8")
        self._completions = (workdir / COMPLETIONS).open("a", encoding="utf-8")
        self._copies = []
        if board is not None:
            self._copies.append(_open_tensorboard(board, workdir, resume_step))
        if site is not None:
            self._copies.append(_open_wandb(site, workdir, resume_step))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One line `{"step": step, name: value, ...}`. Values are scalars on the host; NaN and infinities become null.

        Floats are written with the shortest text that reads back as the same double, so equal files mean equal bits.
        """
        values = {name: _plain(float(value)) for name, value in metrics.items()}
        self._append(self._metrics, [{"step": int(step), **values}])
        finite = {name: value for name, value in values.items() if value is not None}
        for write_copy, _ in self._copies:
            write_copy(int(step), finite)

    def completions(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """One line a completion: `{"step": step, ...}` with whatever the row holds, text and rewards."""
        self._append(self._completions, [{"step": int(step), **_plain(row)} for row in rows])

    def close(self) -> None:
        """Closes the files and finishes the copies."""
        self._metrics.close()
        self._completions.close()
        for _, close_copy in self._copies:
            close_copy()

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @staticmethod
    def _append(file: Any, entries: list[dict]) -> None:
        file.write("".join(json.dumps(entry, allow_nan=False) + "\n" for entry in entries))
        file.flush()


def _import_optional(package: str, setting: str) -> Any:
    try:
        return __import__(package)
    except ImportError as error:
        raise UserError(
            f"config.{setting} needs the package {package}, which cannot be imported ({error}): "
            f"pip install {package}, or set config.{setting}=False"
        ) from error


def _open_tensorboard(module: Any, workdir: Path, resume_step: int | None) -> tuple[Any, Any]:
    purge = None if resume_step is None else resume_step + 1
    board = module.SummaryWriter(logdir=str(workdir / "tensorboard"), purge_step=purge)

    def write(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            board.add_scalar(name, value, step)
        board.flush()

    return write, board.close


def _open_wandb(module: Any, workdir: Path, resume_step: int | None) -> tuple[Any, Any]:
    # The name is the run's identity, so that a resumed run goes on in the same plot.
    identity = workdir / "wandb_id.txt"
    if resume_step is None or resume_step < 0 or not identity.exists():
        identity.write_text(f"{workdir.resolve().name}-{time.time_ns():x}\n")
    run = module.init(
        dir=str(workdir),
        project=os.environ.get("WANDB_PROJECT", "gdsd_jax"),
        id=identity.read_text().strip(),
        name=os.environ.get("WANDB_NAME", workdir.resolve().name),
        resume="allow",
    )
    return lambda step, values: run.log(values, step=step), run.finish


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of `workdir/metrics.jsonl`, oldest first, without a last line that is still being written.

    Raises:
      UserError: there is no such file, it is empty, or it holds something else than records.
    """
    path = Path(workdir) / METRICS
    entries = [entry for _, entry in _lines(path)] if path.is_file() else []
    if not entries:
        raise UserError(f"{path} holds no metrics: name the --workdir of a run that has logged a step")
    return entries


# ----------------------------------------------------------------------------------------------------------------------
# Progress


def duration(seconds: float) -> str:
    """`7s`, `4m12s`, `3h05m`, `2d04h`: two units at most."""
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h{total // 60 % 60:02d}m"
    return f"{total // 86400}d{total // 3600 % 24:02d}h"


def _short(value: float | int | str) -> str:
    """Three decimals where they tell something, else an exponent: the line should not jump about."""
    if not isinstance(value, float | np.floating):
        return str(value)
    return f"{value:.1e}" if 0 < abs(value) < 0.005 or abs(value) >= 1e5 else f"{value:.3f}"


class Progress:
    """One line about a loop of `total` steps: step, rate, reward, time left.

    On a terminal a live line that fits its width; elsewhere (a log file) a plain line at the first and the last update
    and in between at most one every `plain_seconds`. The rate is the mean over the last 20 updates.

    Args:
      total: the last step; `start`: the steps done before, which do not count for the rate.
      enabled: False prints nothing (hosts other than 0).
      label: the word in front.
      console: where to print; None is standard output.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        enabled: bool = True,
        label: str = "train",
        plain_seconds: float = 1.0,
        console: rich.console.Console | None = None,
    ) -> None:
        self._total, self._step, self._enabled, self._label = total, start, enabled, label
        self._plain_seconds = plain_seconds
        self._console = console or rich.console.Console()
        self._times: collections.deque[tuple[float, int]] = collections.deque(maxlen=21)
        self._shown_at = -math.inf
        self._live: rich.progress.Progress | None = None

    def __enter__(self) -> Progress:
        self._times.append((time.monotonic(), self._step))
        if self._enabled and self._console.is_terminal:
            self._live = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}", markup=False),
                rich.progress.BarColumn(bar_width=None),
                rich.progress.TextColumn("{task.fields[text]}", markup=False),
                console=self._console,
                expand=True,
            )
            self._live.start()
            text = f"{self._step}/{self._total}"
            self._task = self._live.add_task(self._label, total=self._total, completed=self._step, text=text)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, step: int, **shown: float | int | str | None) -> None:
        """`step` steps are done; `shown` are further numbers, the most important first (`reward=0.5`)."""
        if not self._enabled:
            return
        now = time.monotonic()
        self._step = step
        self._times.append((now, step))
        if self._live is not None:
            # Twelve columns stay for the bar; what does not fit is dropped from the end.
            room = self._console.width - len(self._label) - 14
            self._live.update(self._task, completed=step, text=self._line(shown, room), refresh=True)
        elif step >= self._total or now - self._shown_at >= self._plain_seconds:
            self._shown_at = now
            self._console.out(f"{self._label} {self._line(shown, None)}", highlight=False)

    def note(self, text: str) -> None:
        """A line of its own, above the live one."""
        if self._enabled:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _line(self, shown: Mapping[str, Any], room: int | None) -> str:
        # Compilation sits in the first step: once a second one is done, the time before the first no longer counts.
        first = self._times[1] if len(self._times) > 2 and len(self._times) < self._times.maxlen else self._times[0]
        (then, before), (now, step) = first, self._times[-1]
        head, tail = [f"{step}/{self._total}"], []
        if now > then and step > before:
            rate = (step - before) / (now - then)
            head.append(f"{1 / rate:.1f} s/it" if rate < 0.1 else f"{rate:.{0 if rate >= 100 else 2}f} it/s")
            left = self._total - step
            tail = [f"{duration(left / rate)} left"] if left > 0 else []
        extra = [f"{name.replace('_', ' ')} {_short(value)}" for name, value in shown.items() if value is not None]
        while room is not None and extra and len(" | ".join(head + extra + tail)) > room:
            extra.pop()
        return " | ".join(head + extra + tail)


# ----------------------------------------------------------------------------------------------------------------------
# Curves


class Panel(NamedTuple):
    """A panel of `curves.png`: the metrics of `names`, in this order, or every `prefix...` not drawn elsewhere.

    `floor` and `ceiling` fix an end of the vertical axis, `log` allows a logarithmic one, `smooth` a running mean.
    `typical` ends the axis at three medians: compiling takes the first step off the scale of the others.
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
# Drawn as the band around reward/mean.
SPREAD = "reward/std"
# Okabe and Ito's colours, distinct for colour-blind eyes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def plot_curves(workdir: str | os.PathLike) -> Path:
    """Draws `workdir/curves.png` from `workdir/metrics.jsonl`: a panel for each kind of metric that was logged.

    Noisy curves of more than 60 points are drawn faint with their running mean over a twentieth of them on top.

    Raises:
      UserError: there are no metrics to draw.
    """
    # Here and not above: Matplotlib takes a second to import, and a command needs it once, at its end.
    from matplotlib.figure import Figure

    entries = read_metrics(workdir)
    names = sorted({name for entry in entries for name in entry} - {"step"})
    series = {name: _series(entries, name) for name in names}
    series = {name: points for name, points in series.items() if np.isfinite(points[1]).any()}
    claimed = {name for panel in PANELS for name in panel.names} | {SPREAD}
    drawn = []
    for panel in PANELS:
        wanted = panel.names or sorted(n for n in series if n.startswith(panel.prefix) and n not in claimed)
        present = [name for name in wanted if name in series]
        # A curve of zeros says nothing about rewards that failed; an empty panel would only push others aside.
        if present and not (present == ["reward/nan"] and not np.nansum(series["reward/nan"][1])):
            drawn.append((panel, present))
    if not drawn:
        raise UserError(f"{Path(workdir) / METRICS} holds none of the metrics that are drawn")

    columns = min(4 if len(drawn) > 9 else 3, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    first, last = (pick(entry["step"] for entry in entries) for pick in (min, max))
    margin = 0.03 * max(last - first, 1)
    figure = Figure(figsize=(4.4 * columns, 3.1 * rows + 0.4), layout="constrained", dpi=110)
    figure.suptitle(f"{Path(workdir).resolve().name}: step {last}")
    for index, (panel, present) in enumerate(drawn):
        axes = figure.add_subplot(rows, columns, index + 1)
        _draw(axes, panel, {name: series[name] for name in present}, series.get(SPREAD))
        axes.set_xlim(first - margin, last + margin)
        # Only the lowest panel of each column carries the shared axis label.
        if index + columns >= len(drawn):
            axes.set_xlabel("step")
    path = Path(workdir) / CURVES
    draft = path.with_name("." + path.name)
    figure.savefig(draft, format="png")
    draft.replace(path)
    return path


def _series(entries: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric; null is NaN, which leaves a gap."""
    points = [(entry["step"], entry[name]) for entry in entries if name in entry]
    steps, values = zip(*points, strict=True)
    return np.asarray(steps, float), np.asarray([np.nan if v is None else v for v in values], float)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of the finite values in a centred window, which shrinks at both ends."""
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
        colour = COLOURS[index % len(COLOURS)]
        label = name.rsplit("/", 1)[-1].replace("_", " ")
        marker = "o" if len(steps) <= 30 else None
        if panel.smooth and len(steps) > 60:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            values = _running_mean(values, 2 * (len(values) // 40) + 1)
        axes.plot(steps, values, color=colour, linewidth=1.6, marker=marker, markersize=3, label=label)
        if name == "reward/mean" and spread is not None:
            width = np.interp(steps, *spread)
            axes.fill_between(steps, values - width, values + width, color=colour, alpha=0.15, linewidth=0)
    axes.set_title(panel.title, fontsize=11)
    axes.set_ylabel(panel.label, fontsize=9)
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


def main(arguments: list[str]) -> int:
    """Draws the curves of one run; 0, or 2 after a one-line error."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m gdsd_jax.training.metrics WORKDIR", file=sys.stderr)
        return 2
    try:
        print(plot_curves(arguments[0]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
