"""What runs inside a sandbox: process 1, and for each test a tester and the program. Standard library only.

`gdsd_jax.tasks.sandbox` starts this module as process 1 of fresh namespaces and talks to it over standard input and
output, in frames (4 bytes of length, then that many bytes). An item is a header (JSON) and for each of its tests the
test and the program; its answer is the list of verdicts. For each test process 1 forks

- the tester, which reads the test, runs it and reports a verdict over a pipe that only it and process 1 hold, and
- the program, which never reads a test and never shares an interpreter with one (`guest.objects`).

Neither can be traced, both are without privileges.
After each test process 1 kills whatever else there is; after each item it empties /tmp and renews the IPC namespace.
Process 1 itself reads neither tests nor programs, so that no later program finds them in its memory.
"""

import json
import os
import resource
import select
import signal
import socket
import struct
import time

from gdsd_jax.tasks.sandbox.guest.confine import enter, give_up_privileges, renew
from gdsd_jax.tasks.sandbox.guest.objects import CRASHED, OUT_OF_MEMORY, TIMED_OUT, exactly, run_test, serve

_ALONE = os.getpid() == 1  # every other process that is seen from here belongs to the sandbox
_POLL_SECONDS = 0.02


# ----------------------------------------------------------------------------------------------------------------------
# Process 1


def main(settings):
    """Builds the rest of the sandbox, then judges items until standard input ends."""
    enter(settings)
    while True:
        try:
            header = json.loads(_frame(0))
        except EOFError:
            return
        verdicts = json.dumps([_judge(header["shadowed"], settings) for _ in range(header["tests"])]).encode()
        if settings["backend"] != "none":
            renew(settings)
        os.write(1, struct.pack("!I", len(verdicts)) + verdicts)


def _judge(shadowed, settings):
    """The verdict of the next test on standard input."""
    tester_end, program_end = socket.socketpair()
    report, write_report = os.pipe()
    ready, write_ready = os.pipe()
    arguments = (write_ready, settings["rlimits"])
    tester = _fork(_tester, tester_end, *arguments, write_report, shadowed)
    os.close(write_report)
    os.read(ready, 1)  # the tester has read its test: the program does not find it on standard input
    program = _fork(_program, program_end, *arguments)
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
    ended_by = _kill(tester, program).get(program)
    return TIMED_OUT if verdict == CRASHED and ended_by == signal.SIGXCPU else verdict


def _fork(function, *arguments):
    """Runs the function in a new process, which ends without returning into the code of process 1."""
    process = os.fork()
    if process == 0:
        try:
            os.setsid()  # a signal to its group must not reach what started the sandbox
            function(*arguments)
        finally:
            os._exit(1)
    return process


def _tester(connection, write_ready, rlimits, write_report, shadowed):
    test = _text_frame(write_ready, rlimits, connection.fileno(), write_report)
    os.write(write_report, bytes([run_test(test, shadowed, connection)]))


def _program(connection, write_ready, rlimits):
    serve(_text_frame(write_ready, rlimits, connection.fileno()), connection)


def _text_frame(write_ready, rlimits, *keep):
    """What a forked process reads: then it says so, is left with these descriptors alone, and without privileges."""
    text = _frame(0).decode("utf-8", "surrogatepass")
    os.write(write_ready, b"r")
    _silence(keep)
    for name, value in rlimits.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    give_up_privileges()
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
    (size,) = struct.unpack("!I", exactly(lambda count: os.read(descriptor, count), 4))
    return exactly(lambda count: os.read(descriptor, count), size)
