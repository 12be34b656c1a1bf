"""Holds back what the process writes to stderr while a library works that prints there by itself."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

_STDERR, _CHUNK = 2, 1 << 16
_turn = threading.RLock()  # the process has one stderr: of several threads, one at a time holds it back
_held: list[tuple[int, BinaryIO]] = []  # while it is held back: where it goes otherwise, and the file in its place


@contextmanager
def held_back() -> Iterator[Callable[[], None]]:
    """Holds stderr back during the block; what was written to it appears at the end.

    The block receives a function that drops what has been written so far. Nothing is held back where stderr is closed,
    no file can be made, or this thread holds it back already. A process that is started during the block, and outlives
    it, writes to a file that nobody reads.
    """
    with _turn:
        if _held or not _hold():
            yield lambda: None
            return
        try:
            yield _drop
        finally:
            release()


def release() -> None:
    """Gives stderr back before the end of the block, from any thread: a process that must end now says why."""
    with suppress(IndexError):
        terminal, file = _held.pop()
        os.dup2(terminal, _STDERR)
        os.close(terminal)
        with file, suppress(OSError):
            file.seek(0)
            while text := file.read(_CHUNK):
                os.write(_STDERR, text)


def _hold() -> bool:
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.flush()
    try:
        terminal = os.dup(_STDERR)
    except OSError:
        return False
    try:
        file = tempfile.TemporaryFile("a+b", buffering=0)  # noqa: SIM115  (`release` closes it)
    except OSError:
        os.close(terminal)
        return False
    _held.append((terminal, file))
    os.dup2(file.fileno(), _STDERR)
    return True


def _drop() -> None:
    for _, file in _held:
        os.ftruncate(file.fileno(), 0)
