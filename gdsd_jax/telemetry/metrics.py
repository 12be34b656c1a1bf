"""Writes a run's metrics and completions to disk, from numbers that are already on the host.

`metrics.jsonl` is always written and is the record of the run; trackers such as TensorBoard get copies of it. Names
have the form `group/name`. Metrics under `time/`, `plan/` and `device/` depend on the machine; a
repeated run reproduces all others bit for bit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.files import plain, replacing, require_regular
from gdsd_jax.runtime.front import first_line, place_in_users_code, say
from gdsd_jax.telemetry.trackers import find_tracker, open_tracker

METRICS, COMPLETIONS = "metrics.jsonl", "completions.jsonl"


def _lines(path: Path) -> list[tuple[bytes, dict]]:
    """Returns the complete lines of a JSONL file with their contents, without a last line that a kill cut short."""
    found = []
    require_regular(path, most=1 << 40)
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict) or type(entry.get("step")) is not int:
            raise UserError(f"{path}: line {number} is not a record with a step: repair the line or move the file away")
        found.append((line, entry))
    return found


def _cut_back(path: Path, last_step: int | None) -> None:
    """Removes an incomplete last line and the lines of steps after `last_step` from a file, atomically."""
    if not path.exists():
        return
    kept = b"".join(line for line, entry in _lines(path) if last_step is None or entry["step"] <= last_step)
    if len(kept) == path.stat().st_size:
        return
    with replacing(path) as draft, draft.open("wb") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())


class MetricWriter:
    """Appends metrics and completions of a run to files in `workdir`; every call flushes, so a kill loses no step.

    Args:
      workdir: directory of the run, which is created if it is missing.
      trackers: names of further places that receive the metrics, see `gdsd_jax.telemetry.trackers`.
      resume_step: step of the restored checkpoint: lines of later steps are removed first. -1 empties the files; None
        removes no step.

    Raises:
      UserError: a tracker is unknown or cannot be opened, or a file holds something other than records.
    """

    def __init__(
        self, workdir: str | os.PathLike, *, trackers: Sequence[str] = (), resume_step: int | None = None
    ) -> None:
        workdir = Path(workdir)
        # Trackers are looked up first, so that a missing package is reported before a file is touched.
        makers = {name: find_tracker(name) for name in trackers}
        workdir.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, COMPLETIONS):
            _cut_back(workdir / name, resume_step)
        self._metrics = (workdir / METRICS).open("a", encoding="utf-8")
        self._completions = (workdir / COMPLETIONS).open("a", encoding="utf-8")
        self._trackers = {name: open_tracker(name, make, workdir, resume_step) for name, make in makers.items()}

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one line `{"step": step, name: value, ...}`; NaN and infinities become null.

        Values are scalars on the host. A float is written as the shortest text that reads back as the same double, so
        that equal files mean equal bits.
        """
        values = {name: plain(float(value)) for name, value in metrics.items()}
        self._append(self._metrics, [{"step": int(step), **values}])
        finite = {name: value for name, value in values.items() if value is not None}
        for name in list(self._trackers):
            self._call(name, "write", int(step), finite)

    def completions(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends one line `{"step": step, ...}` per row, which holds the completion's text, rewards and the like."""
        self._append(self._completions, [{"step": int(step), **plain(row)} for row in rows])

    def close(self) -> None:
        """Closes the files and the trackers."""
        self._metrics.close()
        self._completions.close()
        for name in list(self._trackers):
            self._call(name, "close")

    def _call(self, name: str, method: str, *arguments: Any) -> None:
        """Calls a method of a tracker; one that raises is named and called no more, because it must not end the run."""
        try:
            getattr(self._trackers[name], method)(*arguments)
        except (Exception, SystemExit) as error:  # a service, or code of the user's, may raise anything
            del self._trackers[name]
            place = place_in_users_code(error)
            reason = f"{place + ': ' if place else ''}{type(error).__name__}: {first_line(error)}"
            say(f"note: the tracker {name!r} of config.trackers failed ({reason}) and gets no more metrics")

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @staticmethod
    def _append(file: Any, entries: list[dict]) -> None:
        file.write("".join(json.dumps(entry, allow_nan=False) + "\n" for entry in entries))
        file.flush()


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the records of `workdir/metrics.jsonl`, oldest first, without a line that is still being written.

    Raises:
      UserError: there is no such directory or file, it is empty, or it holds something other than records.
    """
    path = Path(workdir) / METRICS
    if not path.parent.is_dir():
        raise UserError(f"the directory {path.parent} does not exist: name the --workdir of a run")
    entries = [entry for _, entry in _lines(path)] if path.is_file() else []
    if not entries:
        raise UserError(f"{path} holds no metrics: name the --workdir of a run that has logged a step")
    return entries
