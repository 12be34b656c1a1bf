"""Where the time of an iteration goes: its phases on the host, and for how much of each the devices were busy.

`config.profile=N` records iteration N with `jax.profiler` into `WORKDIR/profile`, prints its timeline and writes it to
`WORKDIR/timeline.md`; xprof can open the profile. Recording itself takes time, so only shares should be read from the
timeline. An iteration that compiles (the first) shows little besides compilation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

PREFIX = "gdsd:"


def phase(name: str) -> jax.profiler.TraceAnnotation:
    """Names the code inside this context in a profile; costs nothing while none is recorded. Phases do not overlap."""
    return jax.profiler.TraceAnnotation(PREFIX + name)


class Phase(NamedTuple):
    """One phase of an iteration, with times in seconds.

    start: from the start of the first phase to the start of this one.
    seconds: duration of the phase.
    busy: time within the phase during which a device was busy.
    """

    name: str
    start: float
    seconds: float
    busy: float


class Profile:
    """Records the iteration of a run that has the number `iteration`; 0 records none."""

    def __init__(self, workdir: Path, iteration: int):
        self.directory, self.file, self.iteration = workdir / "profile", workdir / "timeline.md", iteration
        self._running = False

    def begin(self, iteration: int) -> None:
        if iteration == self.iteration:
            options = jax.profiler.ProfileOptions()
            # Calls of Python functions would otherwise make up most of the record.
            options.python_tracer_level = 0
            jax.profiler.start_trace(str(self.directory), profiler_options=options)
            self._running = True

    def end(self) -> str | None:
        """Ends the record and returns the iteration's timeline as Markdown; returns None if none was being recorded."""
        if not self._running:
            return None
        self._running = False
        jax.profiler.stop_trace()
        newest = max(self.directory.glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
        table = markdown(timeline(jax.profiler.ProfileData.from_file(str(newest)).planes))
        self.file.write_text(table + "\n", encoding="utf-8")
        return table

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._running:
            jax.profiler.stop_trace()


def timeline(planes: Iterable[Any]) -> list[Phase]:
    """Finds the phases in the planes of a `jax.profiler.ProfileData`, in order of time.

    A device is busy while one of its operations runs: on TPU and GPU the events of planes named `/device:...`, on CPUs
    those that name an operation of a program, on whichever thread XLA runs it (short programs run on the caller's).
    With several devices, a moment counts as busy if at least one of them is busy.
    """
    phases, operations = [], []
    for plane in planes:
        for line in plane.lines:
            of_device = plane.name.startswith("/device:") or line.name.startswith("tf_XLA")
            for event in line.events:
                span = (event.start_ns, event.start_ns + event.duration_ns)
                if event.name.startswith(PREFIX):
                    phases.append((*span, event.name))
                elif of_device or any(name == "hlo_op" for name, _ in event.stats):
                    operations.append(span)
    busy = _union(operations)
    phases.sort()
    return [
        Phase(
            name.removeprefix(PREFIX),
            (start - phases[0][0]) / 1e9,
            (end - start) / 1e9,
            sum(max(0, min(end, stop) - max(start, begin)) for begin, stop in busy) / 1e9,
        )
        for start, end, name in phases
    ]


def _union(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def markdown(phases: Sequence[Phase]) -> str:
    """Formats the timeline as a table of milliseconds; the last row is the whole, including time between phases."""
    whole = max(phase.start + phase.seconds for phase in phases)
    rows = [(p.name, p.start, p.seconds, p.busy) for p in phases]
    rows.append(("whole", 0.0, whole, sum(phase.busy for phase in phases)))
    lines = ["| phase           | start, ms |      ms | devices busy |", "|---|---:|---:|---:|"]
    for name, start, seconds, busy in rows:
        lines.append(f"| {name:<15} | {1e3 * start:9.1f} | {1e3 * seconds:7.1f} | {busy / seconds:12.0%} |")
    return "\n".join(lines)
