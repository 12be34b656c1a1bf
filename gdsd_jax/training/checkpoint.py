"""Checkpoints of a run: what is trained, the optimizer, the counters, the key and the data position, through Orbax.

The frozen base is not saved again; where it came from and its fingerprint are, and another base is refused. What one
mesh and number of processes saved, any other resumes: the processes of a job share the workdir.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from gdsd_jax.config import TrainConfig
from gdsd_jax.runtime import hosts
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.files import check_disk
from gdsd_jax.training.record import keep_record
from gdsd_jax.training.state import TrainState

BEST = "best"


def _manager(directory: Path, keep: int) -> ocp.CheckpointManager:
    """Saves in the background. A run has two that save at once: processes that meet for one must not meet the other."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=True,
        enable_async_checkpointing=True,
        multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=directory.name),
    )
    return ocp.CheckpointManager(directory.absolute(), options=options)


class Checkpoints:
    """The checkpoints of one workdir.

    Attributes:
      note: a line for the user where the run goes on with settings that round otherwise, else None.

    Args:
      state: a state of the run, for its shapes and for where a restored one shall lie.

    Raises:
      UserError: the workdir belongs to another config or base, or the disk has no room for `keep + 1` checkpoints.
    """

    def __init__(self, workdir: Path, config: TrainConfig, state: TrainState):
        self._template = jax.eval_shape(_raw, state)
        places = jax.tree.map(lambda x: x.sharding, state)
        self._template = jax.tree.map(lambda x, place: x.update(sharding=place), self._template, places)
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self._template))
        saved = len(list((workdir / "checkpoints").glob("[0-9]*")))
        self.note = None
        # The best parameters, and the next best until it is written.
        best = 2 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params))
        if hosts.first():
            check_disk(workdir, size * max(config.keep + 1 - saved, 1) + best, "its checkpoints")
            self.note = keep_record(workdir, config)
        self._manager = _manager(workdir / "checkpoints", config.keep)

    @property
    def latest(self) -> int | None:
        """Iteration of the newest checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, iteration: int, state: TrainState, position: int) -> None:
        """Starts saving in the background; `position` is the index of the next prompt in the global order."""
        if iteration != self.latest:
            data = ocp.args.JsonSave({"position": position})
            # Orbax copies to the host in ways that a transfer guard takes for accidents.
            with jax.transfer_guard_device_to_host("allow"):
                arrays = ocp.args.StandardSave(_raw(state))
                self._manager.save(iteration, args=ocp.args.Composite(state=arrays, data=data))

    def restore(self) -> tuple[TrainState, int]:
        """The newest state and data position."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(self._template), data=ocp.args.JsonRestore())
        restored = self._manager.restore(self.latest, args=args)
        state = restored["state"]
        return state.replace(key=jax.random.wrap_key_data(state.key)), restored["data"]["position"]

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


class Best:
    """The trained parameters that did best in the evaluations of a run: `workdir/best/ITERATION`, and no others.

    Args:
      iteration: finished iterations of the run; what a killed run did best after them, it will do again.
      metric: what "best" means; what did best by another metric gives way to the next evaluation.
    """

    def __init__(self, workdir: Path, iteration: int, metric: str):
        self._metric = metric
        self._manager = _manager(workdir / BEST, 1)
        for later in (step for step in self._manager.all_steps() if step > iteration):
            self._manager.delete(later)
        self._value = -math.inf
        if self._manager.latest_step() is not None:
            data = ocp.args.Composite(data=ocp.args.JsonRestore())
            saved = self._manager.restore(self._manager.latest_step(), args=data)["data"]
            self._value = saved["value"] if saved["metric"] == metric else -math.inf

    def offer(self, iteration: int, params: Any, value: float) -> None:
        """Starts saving `params` in the background if their `value` of the metric is above all before."""
        if value > self._value:
            self._value = value
            data = ocp.args.JsonSave({"metric": self._metric, "value": value})
            with jax.transfer_guard_device_to_host("allow"):
                arrays = ocp.args.StandardSave({"params": params})
                self._manager.save(iteration, args=ocp.args.Composite(state=arrays, data=data))

    def __enter__(self) -> Best:
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def load_params(workdir: Path, shapes: Any, places: Any, *, best: bool = False) -> tuple[Any, int]:
    """The trained parameters of the newest checkpoint of `workdir`, and its iteration. Nothing else of it is read.

    Args:
      shapes, places: shapes and dtypes of the parameters, and their shardings.
      best: of the checkpoint that did best in the run's evaluations instead.

    Raises:
      UserError: there is no checkpoint.
    """
    directory = (workdir / (BEST if best else "checkpoints")).absolute()
    if not directory.is_dir():
        raise UserError(f"{workdir} has no checkpoint yet: train first, or give another --workdir")
    with ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        iteration = manager.latest_step()
        if iteration is None:
            raise UserError(f"{workdir} has no checkpoint yet: train first, or give another --workdir")
        target = jax.tree.map(lambda x, place: x.update(sharding=place), shapes, places)
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        state = ocp.args.PyTreeRestore({"params": target}, {"params": restore_args}, partial_restore=True)
        restored = manager.restore(iteration, args=ocp.args.Composite(state=state))
        return restored["state"]["params"], iteration


def _raw(state: TrainState) -> TrainState:
    """The state with its key as plain integers, which every checkpoint format can hold."""
    return state.replace(key=jax.random.key_data(state.key))
