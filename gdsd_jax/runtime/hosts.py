"""Runs several processes as one job: how it starts, which process does what, and how it ends when one of them fails.

Every process runs the same program over one mesh, follows the same global order of prompts, and ends up with the same
numbers. Work of the hosts that turns texts into numbers, such as rewards, is divided among the processes by whole
groups, and its results are gathered. Only the first process writes files. A single process skips all of this at no
cost.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.ranges import Count, Positive

FAILED = 3  # exit code of a process that leaves a job of several

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):([0-9]{1,5})")

_last_progress = time.monotonic()
_joining = False  # whether this process has begun to join a job, and has not got so far that it knows its size


def initialize(config: HostsConfig) -> None:
    """Joins the other processes of the job before any device is touched; does nothing if there is only one process.

    Raises:
      UserError: the description of the job is incomplete or names no address, or its processes do not find each other.
    """
    global _joining
    environment = os.environ.get
    coordinator = config.coordinator or environment("JAX_COORDINATOR_ADDRESS")
    if not coordinator and ((config.processes or 1) > 1 or config.process):
        raise UserError(
            f"config.hosts names process {config.process} of {config.processes} and no config.hosts.coordinator: "
            "give ADDRESS:PORT of process 0, or leave both out"
        )
    if not coordinator or jax.distributed.is_initialized():
        return
    arguments = {}
    if coordinator != "auto":
        address = _ADDRESS.fullmatch(coordinator)
        if address is None or not 1 <= int(address[2]) < 1 << 16:
            setting = "config.hosts.coordinator" if config.coordinator else "JAX_COORDINATOR_ADDRESS"
            raise UserError(f"{setting} {coordinator!r:.100} is not ADDRESS:PORT of process 0, as in 10.0.0.1:8476")
        known = {"num_processes": config.processes, "process_id": config.process}
        for name, value in known.items():
            text = environment(f"JAX_{name.upper()}", "") if value is None else str(value)
            if not text.isdecimal():
                setting = "processes" if name == "num_processes" else "process"
                raise UserError(f"config.hosts.{setting} is not given: set it, or JAX_{name.upper()}")
            arguments[name] = int(text)
        arguments["coordinator_address"] = coordinator
    # The training loop itself asks in every iteration whether a process has been told to stop.
    jax.config.update("jax_enable_preemption_service", False)
    bound = config.heartbeat_seconds
    _joining = True
    try:
        _in_thread(
            jax.distributed.initialize, heartbeat_timeout_seconds=bound, shutdown_timeout_seconds=bound, **arguments
        )
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the job of config.hosts does not come together ({reason}): check the coordinator") from None
    _joining = False
    if jax.process_count() > 1:
        progressed()
        threading.Thread(target=_watch, args=(config.stall_seconds,), daemon=True).start()


def _in_thread(function: Callable[..., None], **arguments: Any) -> None:
    """Calls a function that waits outside of Python, where no signal is handled, in a thread; Ctrl-C ends the wait."""
    raised: list[BaseException] = []
    done = threading.Event()

    def call() -> None:
        try:
            function(**arguments)
        except BaseException as error:
            raised.append(error)
        finally:
            done.set()

    threading.Thread(target=call, daemon=True).start()
    while not done.wait(1.0):
        pass
    if raised:
        raise raised[0]


def several() -> bool:
    """Returns whether this process is one of several."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def progressed() -> None:
    """Records that the job is alive, because a result of the devices or of the other processes has arrived."""
    global _last_progress
    _last_progress = time.monotonic()


def _watch(bound: float) -> None:
    while time.monotonic() - _last_progress < bound:
        time.sleep(min(1.0, bound / 10))
    leave(f"nothing has arrived from the devices or the other processes for {bound:g} s (config.hosts.stall_seconds)")


def leave(reason: object) -> NoReturn:
    """Ends this process, and thereby the job, for a reason that a new start may mend."""
    who = f"process {jax.process_index()} of {jax.process_count()}"
    advice = "start the job again with the same --workdir: it goes on from its last checkpoint"
    print(f"error: {who} leaves the job: {' '.join(str(reason).split())[:500]}; {advice}", file=sys.stderr, flush=True)
    end(FAILED)


def end(code: int) -> NoReturn:
    """Ends this process with an exit code.

    In a job of several processes it ends at once, without an orderly shutdown, which would wait for the others while
    they wait for this one. They notice within `config.hosts.heartbeat_seconds` that this process is gone. It does the
    same while it still waits for them.
    """
    if _joining or several():
        os._exit(code)
    raise SystemExit(code)


def first() -> bool:
    """Returns whether this process is the one that writes files."""
    return jax.process_index() == 0


def first_only(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Returns `make(*args, **kwargs)` in the first process and a `Silent` in the others."""
    return make(*args, **kwargs) if first() else Silent()


class Silent:
    """Replaces, in the other processes, an object that only the first process has; its methods do nothing."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def gather(values: np.ndarray) -> np.ndarray:
    """Concatenates the `[n, ...]` of all processes, equal in shape, to `[processes * n, ...]` in order of process."""
    # This exchange between the hosts moves arrays in ways that a transfer guard would refuse as accidental.
    with jax.transfer_guard("allow"):
        gathered = multihost_utils.process_allgather(values, tiled=True)
    progressed()
    return gathered


def any_process(flag: bool) -> bool:
    """Returns whether `flag` is set in at least one process; every process must call this function."""
    return bool(gather(np.array([flag])).any()) if several() else flag


def agree(settings: Mapping[str, str]) -> None:
    """Checks that all processes were started with the same settings.

    Raises:
      UserError: a process has other settings than the first one; the message names the first setting that differs.
    """
    if not several():
        return
    digests = [hashlib.sha256(text.encode()).digest()[:8] for text in settings.values()]
    own = np.frombuffer(b"".join(digests), np.uint8).reshape(1, -1)
    everywhere = gather(own).reshape(jax.process_count(), len(settings), 8)
    for index, name in enumerate(settings):
        others = [p for p in range(jax.process_count()) if (everywhere[p, index] != everywhere[0, index]).any()]
        if others:
            raise UserError(f"process {others[0]} was started with another {name} than process 0: give all the same")


def wait() -> None:
    """Waits until every process has called it; what the first process wrote before, all of them can then read."""
    any_process(False)


def share_out(
    function: Callable[[Any, Any], Mapping[str, np.ndarray]],
    values: Sequence[Any] | np.ndarray,
    rows: Sequence[dict],
    *,
    group_size: int = 1,
) -> dict[str, np.ndarray]:
    """Returns `function(values, rows)`, to which each process contributes whole groups of its own.

    Args:
      function: returns columns by name, each float32 with one entry per row.
    """
    if not several():
        return dict(function(values, rows))
    count = len(rows)
    each = -(-count // (group_size * jax.process_count())) * group_size
    start = min(each * jax.process_index(), count)
    own = slice(start, min(start + each, count))
    columns = function(values[own], rows[own])
    table = np.zeros((each, len(columns)), np.float32)
    table[: own.stop - own.start] = np.stack(list(columns.values()), axis=1)
    return dict(zip(columns, gather(table)[:count].T, strict=True))


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """The processes of a job, one on each host.

    Attributes:
      coordinator: "auto" where the platform says who takes part (TPU pods); else ADDRESS:PORT of process 0, with
        `processes` and `process`. Empty: what JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say, or one
        process.
      processes: their number; None: what JAX_NUM_PROCESSES says.
      process: which of them this one is, from 0; None: what JAX_PROCESS_ID says.
      heartbeat_seconds: a process that is silent for so long is dead, and the job ends.
      stall_seconds: the job ends as well when no result has arrived for so long; longer than the longest compilation,
        rollout or reward.
    """

    coordinator: str = ""
    processes: Count | None = None
    process: int | None = None
    heartbeat_seconds: Count = 30
    stall_seconds: Positive = 3600.0
