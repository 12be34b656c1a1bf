"""Scores untrusted text in worker processes, with a limit on each item and no harm to the calling process.

A worker is a fresh interpreter, never a fork of the process that holds JAX, and imports what the score function needs
and nothing else. It receives one item at a time over a socket. Time is the worker's processor time, so that a busy
machine changes no score. At the limit the function is interrupted; if it does not react, the kernel ends the worker. An
item that crashes the worker or needs too much memory may end it too. Only that item is lost; the next one gets a new
worker. Answers come back as JSON, so even a worker that was taken over can only send data.

Linux only: the memory limit reads /proc.
"""

import atexit
import dataclasses
import fcntl
import functools
import importlib
import json
import multiprocessing
import operator
import os
import queue
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from gdsd_jax.runtime.errors import UserError

# Processor time beyond the limit before the kernel ends the worker.
GRACE = 1.0
# Wall-clock limits, for code that waits instead of computing: of a worker's start, and of an item in multiples of its
# limit.
START_SECONDS = 300.0
PATIENCE = 100
MAX_PROCESSES = 32
_MAX_REPLY = 2**20
_START = "import sys; sys.path[:] = sys.argv[5:]; from gdsd_jax.tasks import workers; workers.serve(*sys.argv[1:5])"
# One thread per worker, and the same order of sets in all: a score must not depend on the worker that computed it.
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

Score = Callable[..., Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of one item.

    Attributes:
      seconds: processor time, without the start of a worker.
      megabytes: memory beyond what the worker has after its imports.
      imports: modules that the functions import when called; a worker imports them before the time starts.
      processes: the number of workers; None for one per core that this process may use, at most `MAX_PROCESSES`.
    """

    seconds: float = 5.0
    megabytes: int = 1024
    imports: tuple[str, ...] = ()
    processes: int | None = None


class Outcome(NamedTuple):
    """The outcome of one item.

    values: the result of the function; None if it did not return.
    error: why it did not return: the exception that it raised, or the limit that it met.
    lost: whether the item met a limit or ended its worker.
    seconds: processor time that the item took; 0 if it ended its worker.
    """

    values: dict[str, float] | None
    error: str = ""
    lost: bool = False
    seconds: float = 0.0


def check_importable(function: Score) -> None:
    """Raises UserError unless a worker can import the function by its name."""
    name, module = getattr(function, "__qualname__", "<>"), getattr(function, "__module__", None)
    if module in (None, "__main__") or "<" in name:
        raise UserError(
            f"{name} of {module} cannot run in worker processes: write it as a function at the top of a module that "
            "can be imported, or leave the task's limits out"
        )


@functools.cache
def shared(limits: Limits) -> "Workers":
    """Returns the pool of this process with these limits, which is closed when the process ends."""
    pool = Workers(limits)
    atexit.register(pool.close)
    return pool


class Workers:
    """A pool of workers under the same limits. Each worker is started when it is first needed."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.count = limits.processes or min(len(os.sched_getaffinity(0)), MAX_PROCESSES)
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        for _ in range(self.count):
            self._idle.put(None)

    def map(self, function: Score, items: Iterable[tuple]) -> list[Outcome]:
        """Computes `function(*item)` for each item, in order. The function must be importable, its items picklable."""
        with ThreadPoolExecutor(self.count) as threads:
            return list(threads.map(functools.partial(self._score, function), items))

    def close(self) -> None:
        """Ends the workers; the next `map` starts new ones."""
        for _ in range(self.count):
            worker = self._idle.get()
            if worker is not None:
                worker.end()
            self._idle.put(None)

    def _score(self, function: Score, item: tuple) -> Outcome:
        worker = self._idle.get()
        try:
            if worker is None or worker.process.poll() is not None:
                worker = _Worker(self.limits)
            return worker.score(function, item)
        finally:
            self._idle.put(worker)


class _Worker:
    """The side of one worker that is in this process."""

    def __init__(self, limits: Limits):
        self.seconds = limits.seconds
        self.connection, theirs = multiprocessing.Pipe()
        descriptor = theirs.fileno()
        arguments = [descriptor, limits.seconds, limits.megabytes, ",".join(limits.imports), *sys.path]
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _START, *map(str, arguments)],
                pass_fds=[descriptor],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # The worker has its own session, so that signals from the terminal do not end an item.
                start_new_session=True,
                env=os.environ | _ENVIRONMENT,
            )

    def score(self, function: Score, item: tuple) -> Outcome:
        """Returns the outcome of one item. If the item was the worker's last, the worker's process has then ended."""
        started = False
        try:
            self.connection.send((function.__module__, function.__qualname__, item))
            reply = self._reply(START_SECONDS)
            started = True
            if "error" not in reply:
                reply = self._reply(PATIENCE * self.seconds)
        except (EOFError, OSError) as error:
            self.end()
            if not started:
                raise UserError(f"a worker for {function.__module__} did not start ({self._code()})") from error
            over = isinstance(error, TimeoutError) or self.process.returncode == -signal.SIGPROF
            return Outcome(None, _over(self.seconds) if over else f"ended its worker ({self._code()})", lost=True)
        if reply.pop("worn", False):
            self.end()
        return Outcome(**{"values": None, **reply})

    def _reply(self, seconds: float) -> dict[str, Any]:
        if not self.connection.poll(seconds):
            raise TimeoutError
        return json.loads(self.connection.recv_bytes(_MAX_REPLY))

    def _code(self) -> str:
        return f"exit code {self.process.returncode}"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()


def _over(seconds: float) -> str:
    return f"over {seconds:g} s"


# ----------------------------------------------------------------------------------------------------------------------
# The worker's side


class _TimeIsUp(BaseException):
    """Raised in the function at its limit. It is no Exception, so that the function does not catch it by mistake."""


def _interrupt(number: int, frame: object) -> None:
    raise _TimeIsUp


def serve(descriptor: str, seconds: str, megabytes: str, imports: str) -> None:
    """Answers each request twice, after the import and with the score, until the other side is gone."""
    connection, allowance = Connection(int(descriptor)), int(megabytes) * 2**20
    signal.signal(signal.SIGVTALRM, _interrupt)
    _end_with(connection)
    functions: dict[tuple[str, str], Score] = {}
    limit = 0

    def reply(**fields: Any) -> None:
        connection.send_bytes(json.dumps(fields).encode())

    while True:
        try:
            module, name, item = connection.recv()
        except EOFError:
            return
        if (module, name) not in functions:
            _limit_memory(None)
            try:
                for late in filter(None, imports.split(",")):
                    importlib.import_module(late)
                functions[module, name] = operator.attrgetter(name)(importlib.import_module(module))
            except Exception as error:  # a user's module may raise anything
                reply(error=f"cannot import {module}.{name}: {error!r:.1000}")
                continue
            limit = _size() + allowance
            _limit_memory(limit)
        reply()
        start = time.process_time()
        result = _call(functions[module, name], item, float(seconds))
        result["seconds"] = time.process_time() - start
        # Libraries cache what they have seen; a worker is replaced long before that leaves an item too little memory.
        reply(**result, worn=_size() > limit - allowance // 2)


def _end_with(connection: Connection) -> None:
    """Ends this process when the other side of the connection closes, in the middle of an item too.

    The kernel reports that by a signal: a killed process cannot report it, and an item may wait for minutes.
    """

    def look(number: int, frame: object) -> None:
        # A new poller each time: the signal may come again in the middle, and no poller can be polled twice at once.
        poller = select.poll()
        poller.register(connection, select.POLLRDHUP)
        if poller.poll(0):
            os._exit(1)

    signal.signal(signal.SIGIO, look)
    fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(connection, fcntl.F_SETFL, fcntl.fcntl(connection, fcntl.F_GETFL) | os.O_ASYNC)


def _call(function: Score, item: tuple, seconds: float) -> dict[str, Any]:
    try:
        try:
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
            # This signal has no handler, so it ends the process even if no parent is left to do so.
            signal.setitimer(signal.ITIMER_PROF, seconds + GRACE)
            return {"values": {name: float(value) for name, value in function(*item).items()}}
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.setitimer(signal.ITIMER_PROF, 0)
    except _TimeIsUp:
        return {"error": _over(seconds), "lost": True}
    except MemoryError:
        return {"error": "out of memory", "lost": True}
    except Exception as error:  # a user's own score may raise anything
        return {"error": f"{error!r:.1000}"}


def _size() -> int:
    """Returns the bytes of address space of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _limit_memory(size: int | None) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = hard if size is None else size if hard == resource.RLIM_INFINITY else min(size, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
