"""The side of a sandbox that lies outside of it, in a worker process: starts it, feeds it, ends it."""

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

from gdsd_jax.tasks.sandbox import command
from gdsd_jax.tasks.sandbox.command import UNSAFE
from gdsd_jax.tasks.sandbox.guest import objects
from gdsd_jax.tasks.sandbox.programs import Limits, Program

_START_SECONDS = 120.0


class _Sandbox:
    """This side of one sandbox, which serves many programs one after the other."""

    def __init__(self, backend: str, limits: Limits):
        self.backend, self.limits = backend, limits
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

    def verdicts(self, program: Program) -> list[int]:
        """RuntimeError, after which it has ended, where it does not answer."""
        header = json.dumps({"tests": len(program.tests), "shadowed": program.shadowed}).encode()
        source = program.source.encode("utf-8", "surrogatepass")
        texts = [part for test in program.tests for part in (test.encode("utf-8", "surrogatepass"), source)]
        self.connection.settimeout(_START_SECONDS + (self.limits.seconds + 1.0) * len(program.tests))
        try:
            for data in (header, *texts):
                self.connection.sendall(struct.pack("!I", len(data)) + data)
            return json.loads(objects.receive(self.connection))
        except (OSError, EOFError) as error:
            raise RuntimeError(f"{self.backend}: {self.end()[-300:] or repr(error)}") from error

    def end(self) -> str:
        """Ends it; what it wrote to standard error."""
        with contextlib.suppress(ProcessLookupError):  # nothing is left of it
            os.killpg(self.process.pid, signal.SIGKILL)
        self.connection.close()
        return self.process.communicate()[1].decode(errors="replace").strip()


_running: dict[tuple[str, Limits], _Sandbox] = {}


def run(backend: str, program: Program, limits: Limits) -> Mapping[str, float]:
    """{number of the test: verdict}. Raises where the sandbox does not come up."""
    sandbox = _running.get((backend, limits))
    if sandbox is None or sandbox.process.poll() is not None:
        for other in _running.values():
            other.end()
        _running.clear()
        sandbox = _running[backend, limits] = _Sandbox(backend, limits)
    try:
        verdicts = sandbox.verdicts(program)
    except RuntimeError:
        _running.clear()  # it has ended, and the next program gets a new one
        raise
    return {str(number): float(verdict) for number, verdict in enumerate(verdicts)}


def _settings(backend: str, limits: Limits) -> dict:
    """What `sandbox.guest` is told."""
    mega = 2**20
    rlimits = {
        "RLIMIT_AS": limits.megabytes * mega,
        "RLIMIT_CPU": math.ceil(limits.seconds) + 1,
        "RLIMIT_FSIZE": limits.file_megabytes * mega,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
    }
    if backend != UNSAFE:  # without a user namespace of its own, the limit would count all the user's processes
        rlimits["RLIMIT_NPROC"] = limits.processes
    return {
        "backend": backend,
        "seconds": limits.seconds,
        "total_bytes": limits.total_megabytes * mega,
        "disk_bytes": limits.disk_megabytes * mega,
        "files": limits.files,
        "rlimits": rlimits,
        "read_only": command.read_only(),
    }
