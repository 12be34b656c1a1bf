"""Runs programs that nobody has read, against tests, and says what became of each test.

`judge` is all that callers need. A program and its tests run in namespaces of their own, made by bubblewrap (`bwrap`)
or, where that is absent or fails, by `unshare` of util-linux: no network (not even a loopback), the system's programs
and libraries read-only and nothing else of the machine's files, a small private `/tmp`, an environment of four
variables, limits on time, memory, processes, files and disk, and every process ended after every test. Started as root,
the sandbox first becomes a user without rights, whom the process limit binds. `gdsd_jax.tasks.sandbox_guest` is what
runs inside.

What a verdict is worth. Tests and program run in two processes, and only the one that runs the tests can report: a
program that patches `assert` or builtins, exits, prints or kills does not pass. What the program returns is compared as
plain data, so an `__eq__` of its own does not count against a value of the test. Not guaranteed: a test that asks an
object of the program for the decision (`assert answer.is_right()`), or that compares two of its objects, believes it;
programs see the arguments they are called with; there is the standard library and nothing more; tests cannot hand over
functions or classes of their own. A kernel bug is out of scope, as for every namespace sandbox.

The programs run under worker processes (`gdsd_jax.tasks.workers`): started afresh, without JAX, replaced when they die.
"""

import contextlib
import dataclasses
import enum
import functools
import json
import logging
import math
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gdsd_jax.errors import UserError
from gdsd_jax.tasks import sandbox_guest as guest
from gdsd_jax.tasks import sandbox_objects as objects
from gdsd_jax.tasks import workers

BACKENDS = ("bwrap", "unshare")
UNSAFE = "none"

_START_SECONDS = 120.0
_UNPRIVILEGED = 64321  # a user and group id that no system gives away
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_MOUNTED = "/mnt"
# Runs SETTINGS NAME SOURCE ...: the sources as modules, of which the last has `main`. Programs do not see the modules.
_START = """
import json, sys, types
settings, *named = sys.argv[1:]
for name, source in zip(named[::2], named[1::2]):
    sys.modules[name] = module = types.ModuleType(name)
    exec(compile(source, name, "exec"), vars(module))
for name in named[::2]:
    del sys.modules[name]
del sys.argv[1:]
module.main(json.loads(settings))
"""

_log = logging.getLogger(__name__)


class Verdict(enum.IntEnum):
    """What became of one test."""

    PASSED = objects.PASSED
    FAILED = objects.FAILED
    TIMED_OUT = objects.TIMED_OUT
    OUT_OF_MEMORY = objects.OUT_OF_MEMORY
    CRASHED = objects.CRASHED
    REFUSED = objects.CRASHED + 1  # the sandbox did not come up for it


class Program(NamedTuple):
    """One program and its tests.

    source: Python; executed afresh before each test, whose names are the program's, the tests' and the builtins.
    tests: Python statements; one that runs to its end has passed.
    shadowed: names under which the program may replace a builtin in the tests (a tested function named `sum`).
    """

    source: str
    tests: tuple[str, ...]
    shadowed: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one test may take.

    Attributes:
      seconds: wall clock of program and test together.
      megabytes: address space of each process; `total_megabytes`: resident memory of all.
      processes: processes and threads, the tester's two included.
      disk_megabytes, files: of the private /tmp; `file_megabytes`: of each file.
    """

    seconds: float = 1.0
    megabytes: int = 512
    total_megabytes: int = 1024
    processes: int = 16
    disk_megabytes: int = 16
    files: int = 1024
    file_megabytes: int = 8


def judge(
    programs: Sequence[Program], *, limits: Limits = Limits(), backend: str | None = None, processes: int | None = None
) -> list[list[Verdict]]:
    """A verdict for each test of each program, in order.

    Args:
      backend: "bwrap" or "unshare"; "none" runs the programs without a sandbox, under resource limits alone; None:
        the first sandbox that proves its limits on this machine (see `find`).
      processes: programs at a time; None: one per core.

    Raises UserError where there is no sandbox. Never raises on account of a program.
    """
    backend = backend or find()
    pool = workers.shared(_pool_limits(processes))
    outcomes = pool.map(_run, [(backend, program, limits) for program in programs])
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
    """The first back end that is installed and proves every limit on this machine; UserError where there is none."""
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
    """Why this back end cannot be used here: not installed, did not start, or which limit did not hold. None: it can.

    Every limit is tried by a program that goes against it.
    """
    needed = [name for name in _programs(backend) if shutil.which(name) is None]
    if needed:
        return f"{needed[0]} is not installed"
    limits = Limits(seconds=3.0, total_megabytes=256)
    with socket.create_server(("127.0.0.1", 0)) as server, tempfile.NamedTemporaryFile() as secret:
        probes = _probes(server.getsockname()[1], secret.name, limits)
        pool = workers.shared(_pool_limits(None))
        items = [(backend, Program(_PROBE, (test,)), limits) for test, _ in probes.values()]
        for (name, (_, wanted)), outcome in zip(probes.items(), pool.map(_run, items), strict=True):
            if outcome.values is None:
                return f"did not start: {outcome.error}"
            (verdict,) = outcome.values.values()
            if verdict != wanted:
                return f"the limit on {name} does not hold ({Verdict(int(verdict)).name.lower()})"
    return None


def _pool_limits(processes: int | None) -> workers.Limits:
    return workers.Limits(seconds=3600.0, megabytes=2048, processes=processes)


# ----------------------------------------------------------------------------------------------------------------------
# In a worker


class _Sandbox:
    """This side of one sandbox, which serves many programs one after the other."""

    def __init__(self, backend: str, limits: Limits):
        self.backend, self.limits = backend, limits
        self.connection, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                _command(backend, _settings(backend, limits)),
                stdin=theirs,
                stdout=theirs,
                stderr=subprocess.PIPE,
                env=_ENVIRONMENT,
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


def _run(backend: str, program: Program, limits: Limits) -> Mapping[str, float]:
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
    """What `sandbox_guest` is told."""
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
        "read_only": _read_only(),
    }


def _programs(backend: str) -> list[str]:
    """Executables that a back end needs."""
    return [backend, *(["unshare", "setpriv", "mount"] if os.geteuid() == 0 else [])]


def _command(backend: str, settings: Mapping) -> list[str]:
    """The command line that starts `sandbox_guest` under a back end."""
    name = Path(sys.executable).resolve().relative_to(Path(sys.base_prefix).resolve())
    prefix = _prefix() if backend != UNSAFE else sys.base_prefix
    sources = [text for module in (objects, guest) for text in (module.__name__, Path(module.__file__).read_text())]
    python = [f"{prefix}/{name}", "-I", "-S", "-c", _START, json.dumps(settings), *sources]
    if backend == UNSAFE:
        return python
    if backend == "bwrap":
        inner = ["bwrap", "--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
        inner += ["--uid", "0", "--gid", "0", "--cap-add", "ALL", "--as-pid-1", "--die-with-parent", "--new-session"]
        for path, link in _read_only():
            inner += ["--ro-bind", path, path] if link is None else ["--symlink", link, path]
        inner += ["--proc", "/proc", "--dev", "/dev", "--dir", "/tmp", "--remount-ro", "/dev", "--remount-ro", "/"]
    elif backend == "unshare":
        inner = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--ipc", "--uts", "--cgroup"]
        inner += ["--fork", "--kill-child"]
    else:
        raise ValueError(f"no back end {backend!r}")
    inner += python
    if os.geteuid() != 0:
        return inner
    # The interpreter may live where only root can look: bind it, in a mount namespace, to a place that all can read.
    identity = [f"--reuid={_UNPRIVILEGED}", f"--regid={_UNPRIVILEGED}", "--clear-groups", "--inh-caps=-all"]
    script = 'mount --bind "$0" "$1" && shift && exec setpriv "$@"'
    outer = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, sys.base_prefix, _MOUNTED]
    return [*outer, *identity, *inner]


def _prefix() -> str:
    """Where the interpreter is, seen from a sandbox."""
    return _MOUNTED if os.geteuid() == 0 else sys.base_prefix


@functools.cache
def _read_only() -> list[tuple[str, str | None]]:
    """(path, target of the link that it is, or None) of what a sandbox shows of this machine."""
    found = [(path, os.readlink(path) if os.path.islink(path) else None) for path in _SYSTEM if os.path.lexists(path)]
    if not _prefix().startswith("/usr"):
        found.append((_prefix(), None))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Proof of the limits

_PROBE = '''
import ctypes, errno, os, socket, time

def connects(family, address):
    with socket.socket(family) as client:
        client.settimeout(0.3)
        return client.connect_ex(address) == 0

def exists(path):
    return os.path.exists(path)

def written(paths):
    found = []
    for path in paths:
        try:
            with open(path + "/probe", "w") as file:
                file.write("x")
            found.append(path)
        except OSError:
            continue
    return found

def fork(count, megabytes=0):
    made = 0
    for _ in range(count):
        try:
            process = os.fork()
        except OSError:
            return made
        if process == 0:
            held = b"x" * (megabytes << 20)
            time.sleep(60)
        made += 1
    if megabytes:
        time.sleep(60)
    return made

def fill(files, size):
    try:
        for number in range(files):
            with open(f"/tmp/{number}", "wb") as file:
                file.write(bytes(size))
    except OSError as error:
        return errno.errorcode[error.errno]

def allocate(megabytes):
    return len(bytearray(megabytes << 20))

def spin():
    while True:
        pass

def environment():
    return sorted(os.environ)

def privileges():
    with open("/proc/self/status") as file:
        status = dict(line.split(":", 1) for line in file)
    return [int(status[name], 16) for name in ("CapEff", "CapPrm", "CapBnd", "NoNewPrivs")]

def namespaces():
    return ctypes.CDLL(None).unshare(0x10000000)

def kill_parent():
    os.kill(os.getppid(), 9)
    return os.getppid()
'''


def _probes(port: int, secret: str, limits: Limits) -> dict[str, tuple[str, Verdict]]:
    """{limit: (test on `_PROBE`, the verdict where it holds)}."""
    passed = Verdict.PASSED
    hidden = [secret, str(Path(__file__).resolve()), str(Path.home() / ".bashrc"), "/etc/passwd"]
    read_only = ["/", "/usr", "/dev", "/dev/shm", "/proc", "/etc", _prefix()]
    environment = sorted({*_ENVIRONMENT, "LC_CTYPE", "PWD"})
    return {
        "network": (f"assert not connects(2, ('127.0.0.1', {port}))", passed),
        "files that are seen": (f"assert not any(map(exists, {hidden!r}))", passed),
        "files that are written": (f"assert written({read_only!r}) == [] and written(['/tmp']) == ['/tmp']", passed),
        "environment": (f"assert set(environment()) <= set({environment!r})", passed),
        "processes": (f"assert fork({4 * limits.processes}) < {limits.processes}", passed),
        "memory of a process": (f"allocate({2 * limits.megabytes})", Verdict.OUT_OF_MEMORY),
        "memory of all processes": (f"fork(5, {limits.total_megabytes // 4})", Verdict.OUT_OF_MEMORY),
        "file size": (f"assert fill(1, {2 * limits.file_megabytes} << 20) == 'EFBIG'", passed),
        "disk": (f"assert fill(2 * {limits.disk_megabytes}, 1 << 20) == 'ENOSPC'", passed),
        "number of files": (f"assert fill(2 * {limits.files}, 0) == 'ENOSPC'", passed),
        "time": ("spin()", Verdict.TIMED_OUT),
        "privileges": ("assert privileges() == [0, 0, 0, 1] and namespaces() != 0", passed),
        "process 1": ("assert kill_parent() == 1", passed),
    }
