"""Saves and restores a run's trained parameters, optimizer, counters, key and data position, with Orbax.

The frozen base is not saved. Its path and fingerprint are recorded, and another base is refused. A run can be resumed
on another mesh and with another number of processes. The processes of a job share the workdir.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import re
import shutil
import time
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from gdsd_jax.config import TrainConfig
from gdsd_jax.runtime import front, hosts
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.files import Lock, check_disk
from gdsd_jax.runtime.transfer import checksum, fetch
from gdsd_jax.training.cursor import Cursor
from gdsd_jax.training.intact import newest_intact, require_intact, require_readable, sealed, structure
from gdsd_jax.training.record import keep_record
from gdsd_jax.training.state import TrainState, by_field, from_saved, saved_parts, to_save

BEST = "best"

# Orbax measures its waiting times by the wall clock. Setting the clock forward would end a save at once and leave
# threads that never end. The two modules of Orbax that wait therefore get a monotonic clock.
for _name in ("future", "signaling_client"):
    with contextlib.suppress(ImportError):
        _module = importlib.import_module(f"orbax.checkpoint._src.futures.{_name}")
        _module.time = types.SimpleNamespace(**vars(time) | {"time": time.monotonic})


def _manager(directory: Path, keep: int) -> ocp.CheckpointManager:
    """Returns a manager that saves in the background.

    The two managers of a run may save at the same time. The prefix keeps their barriers apart. A manager that is not
    lightweight reads the metadata of every checkpoint at its start, and fails if those of one are damaged.

    Raises:
      UserError: the directory is a file.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is not a directory, but checkpoints are written there: move it away")
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=True,
        enable_async_checkpointing=True,
        lightweight_initialize=True,
        multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=directory.name),
    )
    return ocp.CheckpointManager(directory.absolute(), options=options)


def require_savable(workdir: Path, setting: str = "--workdir") -> None:
    """Raises UserError if checkpoints could not be saved below a path, although other files could.

    Orbax takes a pair of brackets for a pattern, and TensorStore a backslash for a slash.
    """
    found = re.search(r"\[.+\]|\\", str(workdir.absolute()))
    if found is not None:
        raise UserError(
            f"{workdir.absolute()} contains {found[0]}, and checkpoints cannot be saved there: choose another {setting}"
        )


class _Saver:
    """Saves arrays and a few plain values, with checksums by which a reader notices any change of either.

    If a save fails in the background, the next save or the end of the run notices it, and tries it once more unless the
    disk is full.
    """

    def __init__(self, directory: Path, keep: int):
        self.manager = _manager(directory, keep)
        self._last: tuple[int, dict[str, Any], dict[str, Any]] | None = None

    def save(self, iteration: int, arrays: dict[str, Any], values: dict[str, Any]) -> None:
        """Starts saving in the background.

        Args:
          arrays: pytrees by the names under which they are saved; the checksums are in the order of these names.

        Raises:
          UserError: the disk is full.
        """
        self._settle()
        sums = [int(x) for x in fetch(checksum(list(arrays.values())))]
        values = sealed(values | {"checksums": sums, "structure": structure(by_field(arrays))})
        self._last = iteration, arrays, values
        try:
            self._start()
        except Exception as error:
            self._failed(error)

    def _start(self) -> None:
        iteration, arrays, values = self._last
        # Orbax copies to the host in ways that a transfer guard refuses.
        with jax.transfer_guard_device_to_host("allow"):
            items = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
            self.manager.save(iteration, args=ocp.args.Composite(data=ocp.args.JsonSave(values), **items))

    def _settle(self) -> None:
        """Waits until the last save is on disk."""
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            self._failed(error)
        self._last = None

    def _failed(self, error: Exception) -> None:
        if front.disk_is_full(error):
            self._last = None
            raise UserError(
                f"the disk has no room for a checkpoint ({front.first_line(error)}): make room, and start the same "
                "command again, which continues from the last checkpoint"
            ) from error
        if self._last is None:
            raise error
        iteration, arrays, _ = self._last
        front.say(f"note: the checkpoint of iteration {iteration} was not written ({front.first_line(error)})")
        if not any(leaf.is_deleted() for leaf in jax.tree.leaves(arrays)):
            front.say("note: writing it again")
            self._start()
            self.manager.wait_until_finished()
        self._last = None

    def close(self) -> None:
        """Waits until everything is on disk."""
        try:
            self._settle()
        finally:
            self.manager.close()


def _orderly(kind: type | None) -> bool:
    """Returns whether a run ends as one that has saved everything, so that a failed save must be reported.

    Any other error that ended the run says more than the errors that follow from it.
    """
    return kind is None or issubclass(kind, SystemExit)


class Checkpoints:
    """The checkpoints of one workdir, which no other job can use while they are open.

    Attributes:
      note: a line for the user if the run continues with settings that change its rounding, else None.

    Args:
      state: a state of the run, which defines the shapes and the placement of a restored state.
      data: a digest of the training rows, which the record of the run keeps.

    Raises:
      UserError: another job trains in the workdir, the workdir belongs to another config, base or training rows, or the
        disk has no room for `keep + 1` checkpoints.
    """

    def __init__(self, workdir: Path, config: TrainConfig, state: TrainState, data: str | None = None):
        self._workdir, self._template = workdir, jax.eval_shape(to_save, state)
        places = jax.tree.map(lambda x: x.sharding, saved_parts(state))
        self._template = jax.tree.map(lambda x, place: x.update(sharding=place), self._template, places)
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self._template))
        saved = len(list((workdir / "checkpoints").glob("[0-9]*")))
        self.note = None
        # The best parameters need room twice, because their successors are written before they are deleted.
        best = 2 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params))
        self._lock = None
        if hosts.first():
            check_disk(workdir, size * max(config.keep + 1 - saved, 1) + best, "its checkpoints")
            self._lock = Lock(workdir)
        try:
            if hosts.first():
                self.note = keep_record(workdir, config, data)
            self._saver = _Saver(workdir / "checkpoints", config.keep)
        except BaseException:
            self._release()
            raise

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()

    @property
    def latest(self) -> int | None:
        """Returns the iteration of the newest checkpoint, or None if there is none."""
        return self._saver.manager.latest_step()

    def save(self, iteration: int, state: TrainState, cursor: Cursor) -> None:
        """Starts saving in the background; `cursor` is the place of the run in its data."""
        if iteration != self.latest:
            values = {"position": cursor.position}
            if cursor.rejections is not None:
                values["rejections"] = cursor.rejections.tolist()
            self._saver.save(iteration, to_save(state), values)

    def restore(self) -> tuple[TrainState, Cursor]:
        """Returns the newest intact state and its place in the data; moves damaged checkpoints to `WORKDIR/damaged`.

        Raises:
          UserError: no checkpoint is intact.
        """
        manager = self._saver.manager
        # JAX sorts the keys of a dictionary, and the checksums begin with those of the state.
        names = sorted(self._template, reverse=True)
        items = {name: ocp.args.StandardRestore(self._template[name]) for name in names}
        args = ocp.args.Composite(data=ocp.args.JsonRestore(), **items)

        def read(iteration: int) -> tuple[TrainState, Cursor]:
            restored = manager.restore(iteration, args=args)
            found, data = {name: restored[name] for name in items}, restored["data"]
            require_intact(data, list(found.values()))
            rejections = data.get("rejections")
            memory = None if rejections is None else np.array(rejections, np.int32)
            return from_saved(found), Cursor(data["position"], memory)

        found, iteration = newest_intact(manager, read, by_field(self._template), self._workdir / "checkpoints")
        later = [step for step in manager.all_steps() if step > iteration]
        if later and hosts.first():
            aside = self._workdir / "damaged"
            aside.mkdir(exist_ok=True)
            for step in later:
                shutil.rmtree(aside / str(step), ignore_errors=True)
                (self._workdir / "checkpoints" / str(step)).rename(aside / str(step))
        hosts.wait()
        manager.reload()
        return found

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        try:
            self.close()
        except Exception:
            if _orderly(kind):
                raise

    def close(self) -> None:
        """Waits until everything is on disk."""
        try:
            self._saver.close()
        finally:
            self._release()


class Best:
    """The trained parameters that did best in the evaluations of a run, saved alone in `workdir/best/ITERATION`.

    Args:
      iteration: the number of finished iterations. Parameters of later iterations are deleted, because the run repeats
        these iterations.
      metric: the metric that decides. Parameters that were best by another metric are replaced at the next evaluation.
    """

    def __init__(self, workdir: Path, iteration: int, metric: str):
        self._metric = metric
        self._saver = _Saver(workdir / BEST, 1)
        manager = self._saver.manager
        for later in (step for step in manager.all_steps() if step > iteration):
            manager.delete(later)
        self._value = -math.inf
        latest = manager.latest_step()
        if latest is not None:
            problem = None
            try:
                saved = manager.restore(latest, args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"]
                require_intact(saved)
                self._value = saved["value"] if saved["metric"] == metric else -math.inf
            except Exception as error:
                require_readable(error, workdir / BEST / str(latest))
                problem = front.first_line(error)
            # All processes delete it together, even if one alone cannot read it.
            if hosts.any_process(problem is not None):
                self._value = -math.inf
                reason = problem or "another process cannot read it"
                front.say(f"note: {workdir / BEST} is damaged ({reason}): the next best takes its place")
                manager.delete(latest)

    def offer(self, iteration: int, params: Any, value: float) -> None:
        """Starts saving `params` in the background if `value`, their metric, exceeds all earlier values."""
        if value > self._value:
            self._value = value
            self._saver.save(iteration, {"state": {"params": params}}, {"metric": self._metric, "value": value})

    def __enter__(self) -> Best:
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        try:
            self._saver.close()
        except Exception:
            if _orderly(kind):
                raise


def load_params(workdir: Path, shapes: Any, places: Any, *, best: bool = False) -> tuple[Any, int]:
    """Returns the trained parameters of the newest intact checkpoint of `workdir`, and its iteration.

    No other arrays of the checkpoint are read.

    Args:
      shapes: shapes and dtypes of the parameters.
      places: their shardings.
      best: reads the parameters that did best in the run's evaluations instead.

    Raises:
      UserError: there is no checkpoint, or none that is intact.
    """
    directory = (workdir / (BEST if best else "checkpoints")).absolute()
    if not directory.is_dir():
        raise UserError(f"{workdir} has no checkpoint yet: train first, or give another --workdir")
    options = ocp.CheckpointManagerOptions(read_only=True, lightweight_initialize=True)
    with ocp.CheckpointManager(directory, options=options) as manager:
        if not manager.all_steps():
            raise UserError(f"{workdir} has no checkpoint yet: train first, or give another --workdir")
        target = jax.tree.map(lambda x, place: x.update(sharding=place), shapes, places)
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        state = ocp.args.PyTreeRestore({"params": target}, {"params": restore_args}, partial_restore=True)
        items = ocp.args.Composite(state=state, data=ocp.args.JsonRestore())

        def read(iteration: int) -> Any:
            restored = manager.restore(iteration, args=items)
            params = restored["state"]["params"]
            require_intact(restored["data"], params)
            return params

        return newest_intact(manager, read, {"params": shapes}, directory)
