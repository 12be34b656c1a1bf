"""Records where the time of an iteration goes: its phases on the host, and the share of each with busy devices.

`config.profile=N` records iteration N with `jax.profiler` into `WORKDIR/profile`, which xprof can open. It prints the
timeline and writes it to `WORKDIR/timeline.md`. Recording takes time itself, so only shares should be read from the
timeline. An iteration that compiles, such as the first, shows little besides compilation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

PREFIX = "gdsd:"


def phase(name: str) -> jax.profiler.TraceAnnotation:
    """Returns a context that names the code inside it in a profile; it costs nothing while none is recorded.

    Phases must not overlap.
    """
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
    """Records one iteration of a run, the one with the number `iteration`; 0 records none."""

    def __init__(self, workdir: Path, iteration: int) -> None:
        self.directory, self.file, self.iteration = workdir / "profile", workdir / "timeline.md", iteration
        self._running = False

    def begin(self, iteration: int) -> None:
        """Starts recording if this is the iteration to record."""
        if iteration == self.iteration:
            options = jax.profiler.ProfileOptions()
            # Python calls would otherwise make up most of the profile.
            options.python_tracer_level = 0
            jax.profiler.start_trace(str(self.directory), profiler_options=options)
            self._running = True

    def end(self) -> str | None:
        """Stops recording, and returns the timeline as Markdown, or None if nothing was being recorded."""
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
    """Returns the phases in the planes of a `jax.profiler.ProfileData`, in order of time.

    A device is busy while one of its operations runs. On TPUs and GPUs these are the events of planes named
    `/device:...`. On CPUs they are the events that name an operation of a program, on any thread: XLA runs short
    programs on the caller's. With several devices, a moment counts as busy if at least one of them is busy.
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
    """Returns the union of intervals as disjoint intervals, in ascending order."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def markdown(phases: Sequence[Phase]) -> str:
    """Formats the timeline as a table in milliseconds; its last row is the whole, with the time between phases."""
    whole = max(phase.start + phase.seconds for phase in phases)
    rows = [(p.name, p.start, p.seconds, p.busy) for p in phases]
    rows.append(("whole", 0.0, whole, sum(phase.busy for phase in phases)))
    lines = ["| phase           | start, ms |      ms | devices busy |", "|---|---:|---:|---:|"]
    for name, start, seconds, busy in rows:
        lines.append(f"| {name:<15} | {1e3 * start:9.1f} | {1e3 * seconds:7.1f} | {busy / seconds:12.0%} |")
    return "\n".join(lines)
