"""Sends copies of a run's metrics to TensorBoard, Weights & Biases or a tracker of the user's own.

A tracker is any object with the methods of `Tracker`. `config.trackers` lists trackers by name: keys of `TRACKERS`, or
`package.module:NAME`, a function or class that is called with the workdir and the step of the restored checkpoint.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, Protocol

from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.files import write_text
from gdsd_jax.runtime.plugins import is_plugin, load_plugin

METHODS = ("write", "close")


class Tracker(Protocol):
    """Receives the metrics of a run while it is running."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Receives the finite metrics of one step; it is called once for each line of `metrics.jsonl`."""

    def close(self) -> None:
        """Finishes all pending writes."""


def find_tracker(name: str) -> Callable[[Path, int | None], Tracker]:
    """Returns the function that opens the tracker of this name.

    The function takes the directory of the run and the step of the restored checkpoint. Values of later steps that the
    tracker already holds are no longer valid. The step is -1 if the run starts anew, and None if all values stay valid.

    Raises:
      UserError: the name is unknown, a module or package cannot be imported, or the name is of something that makes no
        tracker.
    """
    if is_plugin(name):
        made_by = load_plugin(name, "config.trackers")
        if not callable(made_by):
            raise UserError(f"{name!r} of config.trackers is not a class or function: see docs/new_tracker.md")
        if isinstance(made_by, type):
            _require_methods(name, [method for method in METHODS if _lacks(made_by, method)])
        return made_by
    if name not in TRACKERS:
        raise UserError(f"config.trackers has {name!r}: it takes {', '.join(TRACKERS)}, or package.module:NAME")
    tracker = TRACKERS[name]
    import_package(tracker.package, name)
    return tracker


def require_trackers(names: Iterable[str]) -> None:
    """Raises UserError if a tracker of these names is unknown, cannot be imported, or is none."""
    for name in names:
        find_tracker(name)


def open_tracker(name: str, make: Callable[[Path, int | None], Tracker], workdir: Path, step: int | None) -> Tracker:
    """Opens a tracker that `find_tracker` found.

    Raises:
      UserError: it cannot be opened, or what it opens is no tracker.
    """
    try:
        tracker = make(workdir, step)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a tracker of a user, or a service, may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"the tracker {name!r} of config.trackers cannot be opened: {reason}") from error
    _require_methods(name, [method for method in METHODS if not callable(getattr(tracker, method, None))])
    return tracker


def _require_methods(name: str, missing: list[str]) -> None:
    if missing:
        raise UserError(f"the tracker {name!r} of config.trackers has no {missing[0]!r} (docs/new_tracker.md)")


def _lacks(kind: type, method: str) -> bool:
    """Returns whether objects of a class lack a method: no base defines it, and no function of theirs sets it."""
    functions = [value for base in kind.__mro__ for value in vars(base).values() if isinstance(value, FunctionType)]
    named = any(method in function.__code__.co_names for function in functions)
    return not (named or callable(getattr(kind, method, None)) or hasattr(kind, "__getattr__"))


def import_package(package: str, setting: str) -> ModuleType:
    """Imports and returns the package that a tracker needs; `setting` is the tracker's name.

    Raises:
      UserError: the package cannot be imported.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"the tracker {setting} needs the package {package}, which cannot be imported ({error}): "
            f"pip install {package}, or set config.{setting}=False and remove it from config.trackers"
        ) from error


class TensorBoard:
    """Writes event files to `workdir/tensorboard`."""

    package = "tensorboardX"

    def __init__(self, workdir: Path, resume_step: int | None) -> None:
        purge = None if resume_step is None else resume_step + 1
        module = import_package(self.package, "tensorboard")
        self._board = module.SummaryWriter(logdir=str(workdir / "tensorboard"), purge_step=purge)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def close(self) -> None:
        self._board.close()


class WeightsAndBiases:
    """Logs to Weights & Biases, whose own environment variables set project, name and mode."""

    package = "wandb"

    def __init__(self, workdir: Path, resume_step: int | None) -> None:
        # The file keeps the run's identity, so that a resumed run continues the same curves.
        identity = workdir / "wandb_id.txt"
        if resume_step == -1 or not identity.exists():
            write_text(identity, f"{workdir.resolve().name}-{time.time_ns():x}\n")
        self._run = import_package(self.package, "wandb").init(
            dir=str(workdir),
            project=os.environ.get("WANDB_PROJECT", "gdsd_jax"),
            id=identity.read_text(encoding="utf-8").strip(),
            name=os.environ.get("WANDB_NAME", workdir.resolve().name),
            resume="allow",
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
