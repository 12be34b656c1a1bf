"""Shows the progress of a loop on the terminal, or as plain lines in a log."""

from __future__ import annotations

import collections
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import rich.progress

from gdsd_jax.runtime.console import Console


def duration(seconds: float) -> str:
    """Formats seconds with at most two units: `7s`, `4m12s`, `3h05m`, `2d04h`."""
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h{total // 60 % 60:02d}m"
    return f"{total // 86400}d{total // 3600 % 24:02d}h"


def _short(value: float | int | str) -> str:
    """Formats a float with three decimals, or with an exponent if it is tiny or huge; other values as they are."""
    if not isinstance(value, float | np.floating):
        return str(value)
    return f"{value:.1e}" if 0 < abs(value) < 0.005 or abs(value) >= 1e5 else f"{value:.3f}"


class Progress:
    """Prints the progress of a loop of `total` steps in one line: step, rate, further numbers, time left.

    A terminal gets a live line that fits its width. Anything else, such as a log file, gets plain lines: one at the
    first and one at the last update, and between them at most one every `plain_seconds`. The rate is the mean over the
    last 20 updates.

    Args:
      total: number of the last step.
      start: steps that were done before; they do not count for the rate.
      enabled: whether to print anything.
      label: the word at the beginning of the line.
      plain_seconds: least time between two plain lines, in seconds.
      console: where to print; None: standard output.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        enabled: bool = True,
        label: str = "train",
        plain_seconds: float = 1.0,
        console: Console | None = None,
    ) -> None:
        self._total, self._step, self._enabled, self._label = total, start, enabled, label
        self._plain_seconds = plain_seconds
        # A notebook is treated as a log, because rich would give every line a separate output, or draw a fixed bar.
        self._console = console or Console(force_jupyter=False, force_terminal=sys.stdout.isatty())
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
        """Reports that `step` steps are done; `shown` are further numbers (`reward=0.5`), the most important first."""
        if not self._enabled:
            return
        now = time.monotonic()
        self._step = step
        self._times.append((now, step))
        if self._live is not None:
            # The bar gets at least twelve columns; numbers that do not fit are dropped from the end.
            room = self._console.width - len(self._label) - 14
            self._live.update(self._task, completed=step, text=self._line(shown, room), refresh=True)
        elif step >= self._total or now - self._shown_at >= self._plain_seconds:
            self._shown_at = now
            self._console.out(f"{self._label} {self._line(shown, None)}", highlight=False)

    def note(self, text: str) -> None:
        """Prints `text` on a line of its own, above the live one."""
        if self._enabled:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _line(self, shown: Mapping[str, Any], room: int | None) -> str:
        # The first update includes compilation, so the rate leaves it out as soon as there is a second one.
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
