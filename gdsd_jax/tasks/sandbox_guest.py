"""What runs inside a sandbox: process 1, and for each test a tester and the program. Standard library only.

    python -I -S -c SOURCE SETTINGS

`gdsd_jax.tasks.sandbox` starts this text as process 1 of fresh namespaces and talks to it over standard input and
output, in frames (4 bytes of length, then that many bytes). An item is a header (JSON) and for each of its tests the
test and the program; its answer is the list of verdicts. For each test process 1 forks

- the tester, which reads the test, runs it and reports a verdict over a pipe that only it and process 1 hold, and
- the program, which never reads a test. It executes in a fresh namespace and then serves what the tester asks of it
  over a socket: look up a name, call, iterate, compare.

So a program never shares an interpreter with a test. What it returns arrives as plain data and is compared by the
tester's own interpreter; an object of a class of the program's own stays with the program and the tester holds a
`Remote`, which equals no plain value that it does not consist of. Neither can be traced, both are without privileges.
After each test process 1 kills whatever else there is; after each item it empties /tmp and renews the IPC namespace.
Process 1 itself reads neither tests nor programs, so that no later program finds them in its memory.
"""

import builtins
import ctypes
import importlib
import io
import json
import operator
import os
import pickle
import resource
import select
import signal
import socket
import struct
import sys
import time

PASSED, FAILED, TIMED_OUT, OUT_OF_MEMORY, CRASHED = range(5)

_ALONE = os.getpid() == 1  # every other process that is seen from here belongs to the sandbox
_MAX_FRAME = 2**26
_POLL_SECONDS = 0.02
_PLAIN = {
    "builtins": ("NoneType bool int float complex str bytes bytearray list tuple dict set frozenset range slice "
                 "NotImplementedType ellipsis"),
    "collections": "OrderedDict Counter defaultdict deque",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "datetime": "date datetime time timedelta",
}  # fmt: skip
PLAIN = {(module, name) for module, names in _PLAIN.items() for name in names.split()}
_UPDATE = {
    list: lambda old, new: old.__setitem__(slice(None), new),
    bytearray: lambda old, new: old.__setitem__(slice(None), new),
    dict: lambda old, new: (old.clear(), old.update(new)),
    set: lambda old, new: (old.clear(), old.update(new)),
}


# ----------------------------------------------------------------------------------------------------------------------
# Process 1


def main(settings):
    """Builds the rest of the sandbox, then judges items until standard input ends."""
    _enter(settings)
    while True:
        try:
            header = json.loads(_frame(0))
        except EOFError:
            return
        verdicts = json.dumps([_judge(header["shadowed"], settings) for _ in range(header["tests"])]).encode()
        if settings["backend"] != "none":
            _renew(settings)
        os.write(1, struct.pack("!I", len(verdicts)) + verdicts)


def _judge(shadowed, settings):
    """The verdict of the next test on standard input."""
    tester_end, program_end = socket.socketpair()
    report, write_report = os.pipe()
    ready, write_ready = os.pipe()
    arguments = (write_ready, settings["rlimits"])
    tester = _fork(_run_test, tester_end, *arguments, write_report, shadowed)
    os.close(write_report)
    os.read(ready, 1)  # the tester has read its test: the program does not find it on standard input
    served = _fork(_serve, program_end, *arguments)
    os.read(ready, 1)
    start = time.monotonic()
    for each in (tester_end, program_end):
        each.close()
    for descriptor in (ready, write_ready):
        os.close(descriptor)
    verdict = None
    while verdict is None:
        if select.select([report], [], [], _POLL_SECONDS)[0]:
            verdict = int.from_bytes(os.read(report, 1) or bytes([CRASHED]), "big")
        elif time.monotonic() - start > settings["seconds"]:
            verdict = TIMED_OUT
        elif _ALONE and _resident_bytes() > settings["total_bytes"]:
            verdict = OUT_OF_MEMORY
    os.close(report)
    ended_by = _kill(tester, served).get(served)
    return TIMED_OUT if verdict == CRASHED and ended_by == signal.SIGXCPU else verdict


def _fork(function, *arguments):
    """Runs the function in a new process, which ends without returning into the code of process 1."""
    process = os.fork()
    if process == 0:
        try:
            function(*arguments)
        finally:
            os._exit(1)
    return process


def _text_frame(write_ready, rlimits, *keep):
    """What a forked process reads: then it says so, is left with these descriptors alone, and without privileges."""
    text = _frame(0).decode("utf-8", "surrogatepass")
    os.write(write_ready, b"r")
    _silence(keep)
    for name, value in rlimits.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    _give_up_privileges()
    return text


def _kill(*processes):
    """Ends all other processes of the sandbox, without one these; returns {process: signal that ended it}."""
    ended = {}
    while True:
        for process in (-1,) if _ALONE else processes:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:  # already reaped
                continue
        try:
            process, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return ended
        ended[process] = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        processes = [other for other in processes if other != process]


def _resident_bytes():
    """Memory of all processes here and of System V segments, which belong to no process."""
    pages = 0
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/statm") as file:
                    pages += int(file.read().split()[1])
            except (OSError, IndexError):  # it has ended
                continue
    with open("/proc/sysvipc/shm") as file:
        segments = [line.split() for line in file.readlines()[1:]]
    return pages * resource.getpagesize() + sum(int(fields[-2]) for fields in segments)


# ----------------------------------------------------------------------------------------------------------------------
# Confinement

_LIBC = ctypes.CDLL(None, use_errno=True)
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_CLONE_NEWNET, _CLONE_NEWIPC = 0x40000000, 0x08000000
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 4, 24, 38, 47


def _enter(settings):
    if settings["backend"] != "none":
        if settings["backend"] == "unshare":
            _build_root(settings["read_only"])
        _mount("proc", "/tmp", "proc", _MS_NOSUID | _MS_NODEV)
        with open("/tmp/sys/user/max_user_namespaces", "w") as file:
            file.write("0")  # no capabilities by another user namespace, and so no mounts of a program's own
        _check(_LIBC.unshare(_CLONE_NEWNET), "network namespace")  # one whose loopback is down
        _renew(settings)
    _check(_LIBC.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "not dumpable")


def _renew(settings):
    """An empty /tmp in place of what is mounted there, and no System V segments or message queues."""
    os.chdir("/")
    _check(_LIBC.umount2(b"/tmp", 2), "umount")
    options = f"size={settings['disk_bytes']},nr_inodes={settings['files']},mode=1777"
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, options)
    _check(_LIBC.unshare(_CLONE_NEWIPC), "IPC namespace")
    os.chdir("/tmp")


def _give_up_privileges():
    _check(_LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    _check(_LIBC.prctl(_PR_CAP_AMBIENT, 4, 0, 0, 0), "ambient capabilities")
    capability = 0
    while _LIBC.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _check(_LIBC.capset(header, none), "capabilities")


def _build_root(read_only):
    """A root of read-only system directories, four devices and /proc, in place of the one that this process has."""
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    for source, link in read_only:
        target = f"/tmp{source}"
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if link is not None:
            os.symlink(link, target)
            continue
        os.mkdir(target)
        _mount(source, target, None, _MS_BIND | _MS_REC)
        inherited = os.statvfs(target).f_flag & 0xC0F
        _mount(None, target, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV | inherited)
    for name in ("dev", "proc", "tmp"):
        os.mkdir(f"/tmp/{name}")
    for name in ("null", "zero", "random", "urandom"):
        os.close(os.open(f"/tmp/dev/{name}", os.O_CREAT, 0o644))
        _mount(f"/dev/{name}", f"/tmp/dev/{name}", None, _MS_BIND)
    _mount("proc", "/tmp/proc", "proc", _MS_NOSUID | _MS_NODEV)
    os.chdir("/tmp")
    number = _PIVOT_ROOT[os.uname().machine]
    _check(_LIBC.syscall(number, b".", b"."), "pivot_root")
    _check(_LIBC.umount2(b".", 2), "umount of the old root")
    os.chdir("/")
    _mount(None, "/", None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)


def _mount(source, target, kind, flags, options=None):
    encode = [None if text is None else text.encode() for text in (source, target, kind, options)]
    _check(_LIBC.mount(*encode[:3], ctypes.c_ulong(flags), encode[3]), f"mount of {target}")


def _check(result, what):
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


# ----------------------------------------------------------------------------------------------------------------------
# The tester


class Gone(BaseException):
    """The program does not answer any more. No test can catch it by accident."""


class ProgramError(Exception):
    """An exception that is no builtin one, raised by the program."""


def _run_test(connection, write_ready, rlimits, write_report, shadowed):
    test = _text_frame(write_ready, rlimits, connection.fileno(), write_report)
    try:
        ask = _Asker(connection)
        ask.reply()  # of the program's execution
        scope = {"__name__": "tests", "__builtins__": _Names(ask)}
        scope.update({name: ask("name", name) for name in shadowed})
        exec(compile(test, "<test>", "exec"), scope)
        verdict = PASSED
    except Gone:
        verdict = CRASHED
    except MemoryError:
        verdict = OUT_OF_MEMORY
    except BaseException:
        verdict = FAILED
    os.write(write_report, bytes([verdict]))


class _Names(dict):
    """The builtins of a test; a name that neither test nor builtins have is the program's."""

    def __init__(self, ask):
        super().__init__(vars(builtins))
        self._ask = ask

    def __missing__(self, name):
        return self._ask("name", name)


class _Asker:
    """Asks the program: an operation of `_OPERATIONS` and its arguments; mutable arguments are updated afterwards."""

    def __init__(self, connection):
        self._connection = connection
        self._remotes = {}

    def __call__(self, operation, *arguments, **named):
        buffer = io.BytesIO()
        pickler = pickle.Pickler(buffer, 5)
        pickler.persistent_id = _handle
        pickler.dump((operation, arguments, named))
        _send(self._connection, buffer.getvalue())
        result, after = self.reply()
        for old, new in zip([*arguments, *named.values()], after, strict=False):
            if type(old) is type(new) and type(old) in _UPDATE:
                _UPDATE[type(old)](old, new)
        return result

    def reply(self):
        try:
            kind, *values = self._load(receive(self._connection))
        except (OSError, EOFError) as error:
            raise Gone from error
        if kind == "value":
            return values
        name, message = map(str, values)
        error = vars(builtins).get(name)
        if isinstance(error, type) and issubclass(error, Exception):
            raise error(message)
        raise ProgramError(f"{name}: {message}")

    def _load(self, data):
        loader = _Plain(io.BytesIO(data))
        loader.persistent_load = self._persistent
        return loader.load()

    def _persistent(self, identity):
        kind, value = identity
        if kind == "handle":
            return self._remotes.setdefault(value, Remote(self, value))
        if kind == "builtin" and isinstance(vars(builtins).get(value), type):
            return vars(builtins)[value]
        if kind == "module" and value in sys.stdlib_module_names:
            return importlib.import_module(value)
        raise pickle.UnpicklingError(f"{kind} {value}")


class _Plain(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in PLAIN:
            raise pickle.UnpicklingError(f"{module}.{name} is not plain data")
        return getattr(importlib.import_module(module), name)


class Remote:
    """An object of the program. It compares with plain values as the plain value that it extends, if it does."""

    __slots__ = ("_ask", "_handle")

    def __init__(self, ask, handle):
        object.__setattr__(self, "_ask", ask)
        object.__setattr__(self, "_handle", handle)

    def __eq__(self, other):
        return _compare("eq", self, other)

    def __ne__(self, other):
        return not _compare("eq", self, other)

    def __hash__(self):
        return object.__getattribute__(self, "_ask")("hash", self)


def _handle(value):
    return object.__getattribute__(value, "_handle") if type(value) is Remote else None


def _forwarded(operation):
    def method(self, *arguments, **named):
        return object.__getattribute__(self, "_ask")(operation, self, *arguments, **named)

    return method


_SPECIAL = ("call", "iter", "next", "len", "bool", "str", "repr", "int", "float", "index", "enter", "exit")
for _operation in (*_SPECIAL, "getitem", "setitem", "delitem"):
    setattr(Remote, f"__{_operation}__", _forwarded(_operation))
Remote.__getattr__, Remote.__setattr__, Remote.__delattr__ = map(_forwarded, ("getattr", "setattr", "delattr"))
Remote.__instancecheck__ = lambda self, other: object.__getattribute__(self, "_ask")("instance", other, self)
for _operation in ("lt", "le", "gt", "ge"):
    setattr(Remote, f"__{_operation}__", lambda self, other, name=_operation: _compare(name, self, other))


def _compare(name, left, right):
    """The program's own comparison only between two of its objects; against data of the test, data decides."""
    ask = object.__getattribute__(left, "_ask")
    if type(right) is Remote:
        return ask(name, left, right)
    plain = ask("plain", left)
    return getattr(operator, name)(plain, right) if type(plain) is not Remote else NotImplemented


# ----------------------------------------------------------------------------------------------------------------------
# The program's side


def _serve(connection, write_ready, rlimits):
    program = _text_frame(write_ready, rlimits, connection.fileno())
    namespace, objects = {"__name__": "program"}, {}

    def identity(value):
        kind = type(value)
        if (kind.__module__, kind.__qualname__) in PLAIN:
            return None
        if kind is type and (value.__module__, value.__qualname__) in PLAIN:
            return None
        if kind is type and getattr(builtins, value.__name__, None) is value:
            return "builtin", value.__name__
        if kind is type(sys):
            return "module", value.__name__
        objects[id(value)] = value
        return "handle", id(value)

    def reply(function, *arguments):
        try:
            data = _dump(("value", *function(*arguments)), identity)
        except BaseException as error:
            data = _dump(("raised", type(error).__name__, _text(error)), identity)
        _send(connection, data)

    def execute():
        exec(compile(program, "<program>", "exec"), namespace)
        return None, ()

    def answer(request):
        loader = pickle.Unpickler(io.BytesIO(request))
        loader.persistent_load = objects.__getitem__
        operation, arguments, named = loader.load()
        if operation == "name":
            return _lookup(namespace, *arguments), ()
        result = _OPERATIONS[operation](*arguments, **named)
        return result, [*arguments, *named.values()] if operation == "call" else ()

    reply(execute)
    while True:
        reply(answer, receive(connection))


def _lookup(namespace, name):
    if name not in namespace:
        raise NameError(f"name {name!r} is not defined")
    return namespace[name]


def _plain(value):
    """The plain value that an object extends (a named tuple, a string of a class of its own), or the object."""
    for kind in (str, bytes, int, float, tuple, list, set, frozenset, dict):
        if isinstance(value, kind):
            return kind.__new__(kind, value) if kind in (str, bytes, tuple, frozenset) else kind(value)
    return value


def _text(error):
    try:
        return str(error)[:1000]
    except BaseException:
        return ""


def _dump(value, identity):
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, 5)
    pickler.persistent_id = identity
    pickler.dump(value)
    return buffer.getvalue()


_OPERATIONS = {
    "call": lambda function, *arguments, **named: function(*arguments, **named),
    "instance": isinstance,
    "plain": _plain,
    "enter": lambda value: type(value).__enter__(value),
    "exit": lambda value, *error: type(value).__exit__(value, *error),
    **{name: getattr(builtins, name) for name in ("iter", "next", "len", "bool", "str", "repr", "hash")},
    **{name: getattr(builtins, name) for name in ("int", "float", "getattr", "setattr", "delattr")},
    **{name: getattr(operator, name) for name in ("getitem", "setitem", "delitem", "index")},
    **{name: getattr(operator, name) for name in ("eq", "lt", "le", "gt", "ge")},
}


# ----------------------------------------------------------------------------------------------------------------------
# Frames


def _silence(keep):
    """Standard streams to nowhere, every other descriptor closed but these."""
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    start = 3
    for descriptor in (*sorted(keep), 1024):
        os.closerange(start, descriptor)
        start = descriptor + 1


def _frame(descriptor):
    (size,) = struct.unpack("!I", _exactly(lambda count: os.read(descriptor, count), 4))
    return _exactly(lambda count: os.read(descriptor, count), size)


def _send(connection, data):
    connection.sendall(struct.pack("!I", len(data)) + data)


def receive(connection):
    (size,) = struct.unpack("!I", _exactly(connection.recv, 4))
    if size > _MAX_FRAME:
        raise EOFError
    return _exactly(connection.recv, size)


def _exactly(read, count):
    parts = []
    while count:
        part = read(min(count, 2**20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
