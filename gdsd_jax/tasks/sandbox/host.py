"""Starts sandboxes, hands them programs and ends them; runs in a worker process outside of them."""

import contextlib
import json
import math
import os
import signal
import socket
import struct
import subprocess
import tempfile
from collections.abc import Mapping

from gdsd_jax.tasks.sandbox import command, launch
from gdsd_jax.tasks.sandbox.command import UNSAFE
from gdsd_jax.tasks.sandbox.guest import wire
from gdsd_jax.tasks.sandbox.programs import Limits, Program, Verdict

_START_SECONDS = 120.0
_CANARY_SECONDS = 20.0
_CANARY = """
import os
def f(x, forks):
    path = f"canary-{os.getpid()}"
    with open(path, "wb") as file:
        file.write(bytes(4096))
    os.remove(path)
    if forks and os.fork() == 0:
        os._exit(0)
    return x + 1 + (os.wait()[1] if forks else 0)
"""
_ALWAYS = 4  # processes at most, of which the limit knows: process 1, tester, program and one more


class _Sandbox:
    """Holds the outer end of one sandbox, which serves many programs one after the other."""

    def __init__(self, backend: str, limits: Limits):
        self.backend, self.limits, self.served = backend, limits, 0
        self.connection, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                command.command(backend, _settings(backend, limits)),
                stdin=theirs,
                stdout=theirs,
                stderr=subprocess.PIPE,
                env=command.ENVIRONMENT,
                cwd=tempfile.gettempdir() if backend == UNSAFE else "/",
                start_new_session=True,
            )

    def verdicts(self, program: Program, seconds: float) -> list[int]:
        """Returns each test's verdict under this limit. Without an answer, ends the sandbox and raises RuntimeError."""
        header = {"tests": len(program.tests), "shadowed": program.shadowed, "seconds": seconds}
        texts = [text for test in program.tests for text in ("\n".join([*program.imports, test]), program.source)]
        frames = [json.dumps(header).encode(), *(text.encode("utf-8", "surrogatepass") for text in texts)]
        self.connection.settimeout(_START_SECONDS + (seconds + 1.0) * len(program.tests))
        self.served += 1
        try:
            for data in frames:
                self.connection.sendall(struct.pack("!I", len(data)) + data)
            return json.loads(wire.receive(self.connection))
        except (OSError, EOFError) as error:
            raise RuntimeError(f"{self.backend}: {self.end()[-300:] or repr(error)}") from error

    def check(self) -> None:
        """Ends the sandbox and raises RuntimeError if an honest program does not pass."""
        canary = Program(_CANARY, (f"assert f(1, {self.limits.processes > _ALWAYS}) == 2",))
        verdicts = self.verdicts(canary, max(self.limits.seconds, _CANARY_SECONDS))
        if verdicts != [Verdict.PASSED]:
            raise RuntimeError(f"an honest program is judged {verdicts}: {self.end()[-300:]}")

    def end(self) -> str:
        """Ends the sandbox and returns its standard error."""
        with contextlib.suppress(ProcessLookupError):  # nothing is left of it
            os.killpg(self.process.pid, signal.SIGKILL)
        self.connection.close()
        return self.process.communicate()[1].decode(errors="replace").strip()


_running: dict[tuple[str, Limits], _Sandbox] = {}


def run(backend: str, program: Program, limits: Limits) -> Mapping[str, float]:
    """Returns {number of the test: verdict}. Raises RuntimeError if the sandbox does not start.

    A program that was ended, or that ended the sandbox, may have suffered from an earlier program. Then an honest
    program is judged too; if it does not pass, both sandbox and verdicts are made anew.
    """
    verdicts = []
    for _ in range(2):
        sandbox = _current(backend, limits)
        alone = sandbox.served == 1  # not counting the honest program at its start
        verdicts = [Verdict.CRASHED] * len(program.tests)
        try:
            verdicts = sandbox.verdicts(program, limits.seconds)
            if max(verdicts, default=0) > Verdict.FAILED:
                sandbox.check()
            break
        except RuntimeError:
            _running.clear()  # it has ended, and the next program gets a new one
            if alone:
                break
    return {str(number): float(verdict) for number, verdict in enumerate(verdicts)}


def _current(backend: str, limits: Limits) -> _Sandbox:
    """Returns the sandbox of this worker under these limits, and ends all others."""
    sandbox = _running.get((backend, limits))
    if sandbox is None or sandbox.process.poll() is not None:
        for other in _running.values():
            other.end()
        _running.clear()
        sandbox = _Sandbox(backend, limits)
        sandbox.check()
        _running[backend, limits] = sandbox
    return sandbox


def _settings(backend: str, limits: Limits) -> dict:
    """Returns the settings that `sandbox.guest.main` gets."""
    mega = 2**20
    rlimits = {
        "RLIMIT_AS": limits.megabytes * mega,
        "RLIMIT_CPU": math.ceil(limits.seconds) + 1,
        "RLIMIT_FSIZE": limits.file_megabytes * mega,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_SIGPENDING": 256,
    }
    if backend != UNSAFE:  # without its own user namespace, the limit would count all processes of the user
        rlimits["RLIMIT_NPROC"] = limits.processes
    return {
        "backend": backend,
        "users": launch.USERS if os.geteuid() == 0 and backend != UNSAFE else {},
        "total_bytes": limits.total_megabytes * mega,
        "disk_bytes": limits.disk_megabytes * mega,
        "files": limits.files,
        "rlimits": rlimits,
        "read_only": command.read_only(),
    }
