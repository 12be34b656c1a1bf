"""Runs inside a sandbox as process 1, and for each test a tester and the program. Standard library only.

`gdsd_jax.tasks.sandbox` starts this module as process 1 of fresh namespaces and talks to it over standard input and
output, in frames (4 bytes of length, then that many bytes). An item is a header (JSON) and, for each of its tests,
the test and the program; its answer is the list of verdicts. For each test process 1 forks

- the tester, which reads the test, runs it and reports a verdict over a pipe that only it and process 1 hold, and
- the program, which never reads a test and never shares an interpreter with one (`guest.tester`).

Neither can be traced; both are without privileges and under a filter of system calls. If the sandbox has more than one
user, each of the two is a different one. After each test process 1 kills all other processes and checks that its own
limits are unchanged; after each item it empties /tmp. When the other side of its socket closes, everything ends.
Process 1 itself reads neither tests nor programs, so that no later program finds them in its memory.
"""

import gc
import json
import os
import resource
import select
import signal
import socket
import struct
import time

from gdsd_jax.tasks.sandbox.guest.confine import enter, give_up_privileges, lower, renew
from gdsd_jax.tasks.sandbox.guest.program import serve
from gdsd_jax.tasks.sandbox.guest.tester import CRASHED, OUT_OF_MEMORY, TIMED_OUT, run_test
from gdsd_jax.tasks.sandbox.guest.wire import dump, exactly, load

_ALONE = os.getpid() == 1  # every other process that is seen from here belongs to the sandbox
_POLL_SECONDS = 0.02
_SOCKET_BYTES = 212992  # the bytes that a socket may have in transit if nobody sets its size (net.core.wmem_default)


# ----------------------------------------------------------------------------------------------------------------------
# Process 1


def main(settings):
    """Builds the rest of the sandbox, then judges items until standard input ends."""
    enter(settings)
    limits = _own_limits()
    # Code that ran before the fork runs faster after it, because Python specialises functions that are often called.
    for _ in range(20):
        load(dump(("call", (object, 1, "a"), {"b": [0.5, None]}), id), id)
    gc.collect()
    gc.freeze()  # objects made so far are no garbage; collections in forked processes would copy all of them
    while True:
        try:
            header = json.loads(_frame(0))
        except EOFError:
            return
        verdicts = []
        for _ in range(header["tests"]):
            verdicts.append(_judge(header, settings))
            if _own_limits() != limits:
                return  # somebody changed them, so later programs would be judged under other limits
        if settings["backend"] != "none":
            renew(settings)
        answer = json.dumps(verdicts).encode()
        os.write(1, struct.pack("!I", len(answer)) + answer)


def _own_limits():
    with open("/proc/self/limits") as file:
        return file.read(), os.getpriority(os.PRIO_PROCESS, 0)


def _judge(header, settings):
    """Returns the verdict of the next test on standard input."""
    tester_end, program_end = socket.socketpair()
    report, write_report = os.pipe()
    tester = _fork(_tester, settings, tester_end, write_report, header["shadowed"])
    os.close(write_report)
    program = _fork(_program, settings, program_end)
    start = time.monotonic()
    for each in (tester_end, program_end):
        each.close()
    verdict = None
    while verdict is None:
        if _readable(report, _POLL_SECONDS, tester, program):
            verdict = int.from_bytes(os.read(report, 1) or bytes([CRASHED]), "big")
        elif time.monotonic() - start > header["seconds"]:
            verdict = TIMED_OUT
        elif _ALONE and _used_bytes() > settings["total_bytes"]:
            verdict = OUT_OF_MEMORY
    os.close(report)
    ended_by = _kill(tester, program).get(program)
    return TIMED_OUT if verdict == CRASHED and ended_by == signal.SIGXCPU else verdict


def _fork(function, settings, *arguments):
    """Runs the function in a new process, which never returns into the code of process 1, and waits for its text."""
    ready, write_ready = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.setsid()  # a signal to its group must not reach the process that started the sandbox
            function(write_ready, settings, *arguments)
        finally:
            os._exit(1)
    os.close(write_ready)
    _readable(ready, None, process)
    # If the text were not read from standard input, the next process would take it for its own.
    if not os.read(ready, 1):
        os._exit(1)
    os.close(ready)
    return process


def _readable(descriptor, seconds, *processes):
    """Waits at most this long for something to read; returns whether there is. Ends all if the other side is gone."""
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    poller.register(0, select.POLLRDHUP)
    found = dict(poller.poll(None if seconds is None else 1000 * seconds))
    if 0 in found:
        _kill(*processes)
        os._exit(1)
    return descriptor in found


def _tester(write_ready, settings, connection, write_report, shadowed):
    test = _text(write_ready, settings, "tester", connection.fileno(), write_report)
    os.write(write_report, bytes([run_test(test, shadowed, connection)]))


def _program(write_ready, settings, connection):
    serve(_text(write_ready, settings, "program", connection.fileno()), connection)


def _text(write_ready, settings, kind, *keep):
    """Returns the text for this forked process, which from then on has only these descriptors and no privileges."""
    text = _frame(0).decode("utf-8", "surrogatepass")
    os.write(write_ready, b"r")
    _silence(keep)
    for name, value in settings["rlimits"].items():
        lower(name, value)
    give_up_privileges(settings["users"].get(kind), seen=kind == "program")
    return text


def _kill(*processes):
    """Ends all other processes of the sandbox or, without a sandbox, these; returns {process: signal that ended it}."""
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


def _used_bytes():
    """Returns the bytes of memory of all processes here, plus the most that their unix sockets may hold."""
    pages = 0
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/statm") as file:
                    pages += int(file.read().split()[1])
            except (OSError, IndexError):  # it has ended
                continue
    with open("/proc/self/net/unix") as file:
        sockets = sum(1 for _ in file) - 1
    return pages * resource.getpagesize() + sockets * _SOCKET_BYTES


def _silence(keep):
    """Redirects the standard streams to /dev/null and closes all other descriptors except these."""
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    start = 3
    for descriptor in (*sorted(keep), 1024):
        os.closerange(start, descriptor)
        start = descriptor + 1


def _frame(descriptor):
    (size,) = struct.unpack("!I", exactly(lambda count: os.read(descriptor, count), 4))
    return exactly(lambda count: os.read(descriptor, count), size)
