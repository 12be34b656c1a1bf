"""Runs programs that nobody has read against tests, and returns a verdict for each test.

`judge` is all that callers need. A program and its tests run in namespaces of their own, made by bubblewrap (`bwrap`)
or, where that is absent or fails, by `unshare` of util-linux: no network (not even a loopback), the system's programs
and libraries read-only and nothing else of the machine's files, a small private `/tmp`, an environment of four
variables, a filter of system calls, limits on time, memory, processes, files and disk, and every process ended after
every test. If started as root, the sandbox first becomes three users without rights: process 1, testers and programs.
The modules of `sandbox.guest` run inside.

What a verdict is worth: tests and program run in two processes, and only the one that runs the tests can report. Values
that the program returns arrive there as bytes, are read as plain data and are compared by that process with its own
types. Any other object of the program can be called and asked for attributes, but equals no value of the test.
`docs/tasks.md` has the threat model: what is promised and what is not.

A sandbox serves many programs. Its own limits are checked before each test. An honest program is judged when the
sandbox starts and after every program that had to be ended; if it does not pass, sandbox and verdicts are made anew.

The programs run under worker processes (`gdsd_jax.tasks.workers`): started afresh, without JAX, replaced when they die.
"""

import functools
import logging
import shutil
import socket
import tempfile
from collections.abc import Sequence

from gdsd_jax.runtime.errors import UserError
from gdsd_jax.tasks import workers
from gdsd_jax.tasks.sandbox import host, probes
from gdsd_jax.tasks.sandbox.command import BACKENDS, UNSAFE, executables
from gdsd_jax.tasks.sandbox.programs import Limits, Program, Verdict

__all__ = ["BACKENDS", "UNSAFE", "Limits", "Program", "Verdict", "check", "find", "judge"]

_LIMITS = Limits()
_log = logging.getLogger(__name__)


def judge(
    programs: Sequence[Program], *, limits: Limits = _LIMITS, backend: str | None = None, processes: int | None = None
) -> list[list[Verdict]]:
    """Returns a verdict for each test of each program, in order.

    Args:
      backend: "bwrap" or "unshare"; "none" runs the programs without a sandbox, under resource limits alone; None:
        the first sandbox that proves its limits on this machine (see `find`).
      processes: the number of programs that run at a time; None for one per core.

    Raises UserError if there is no sandbox. No program makes this function raise.
    """
    backend = backend or find()
    pool = workers.shared(_pool_limits(processes))
    outcomes = pool.map(host.run, [(backend, program, limits) for program in programs])
    refused = [outcome for outcome in outcomes if outcome.values is None]
    if refused:
        _log.warning("sandbox: %d of %d programs refused; the first: %s", len(refused), len(programs), refused[0].error)
    return [
        [Verdict.REFUSED] * len(program.tests)
        if outcome.values is None
        else [Verdict(int(code)) for code in outcome.values.values()]
        for program, outcome in zip(programs, outcomes, strict=True)
    ]


@functools.cache
def find() -> str:
    """Returns the first back end that proves every limit on this machine; raises UserError if there is none."""
    failures = []
    for backend in BACKENDS:
        failure = check(backend)
        if failure is None:
            return backend
        failures.append(f"{backend}: {failure}")
    raise UserError(
        f"no sandbox for running code ({'; '.join(failures)}). Install bubblewrap (apt-get install bubblewrap) and "
        "allow user namespaces, or, on a machine that you can afford to lose, name the task that has no sandbox: "
        "--config.task.name=gdsd_jax.tasks.code:UNSAFE"
    )


def check(backend: str) -> str | None:
    """Returns why this back end cannot be used here (absent, did not start, a limit does not hold); None if it can.

    A program tries to break each limit.
    """
    needed = [name for name in executables(backend) if shutil.which(name) is None]
    if needed:
        return f"{needed[0]} is not installed"
    limits = Limits(seconds=3.0, total_megabytes=256)
    with socket.create_server(("127.0.0.1", 0)) as server, tempfile.NamedTemporaryFile() as secret:
        proofs = probes.probes(server.getsockname()[1], secret.name, limits)
        pool = workers.shared(_pool_limits(None))
        items = [(backend, Program(probes.PROBE, (test,)), limits) for test, _ in proofs.values()]
        for (name, (_, wanted)), outcome in zip(proofs.items(), pool.map(host.run, items), strict=True):
            if outcome.values is None:
                return f"did not start: {outcome.error}"
            (verdict,) = outcome.values.values()
            if verdict != wanted:
                return f"the limit on {name} does not hold ({Verdict(int(verdict)).name.lower()})"
    return None


def _pool_limits(processes: int | None) -> workers.Limits:
    return workers.Limits(seconds=3600.0, megabytes=2048, processes=processes)
