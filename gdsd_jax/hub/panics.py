"""Turns panics of the tokenizers library into UserError, and keeps what the library prints about them off the terminal.

A regular expression that takes too many steps ends in a panic, an exception whose class no module exports and which is
no `Exception`. Before it is raised, the library writes lines of its own to the process's stderr, with a backtrace where
RUST_BACKTRACE is set.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from gdsd_jax.runtime.errors import UserError

STDERR, CHUNK = 2, 1 << 16
# The process has one stderr: of several threads, one at a time holds it back.
_turn = threading.Lock()


@contextmanager
def panics_refused(where: os.PathLike, failure: str, remedy: str) -> Iterator[None]:
    """Raises UserError in the place of a panic in the block: "WHERE: FAILURE (what the panic says): REMEDY".

    What any thread of the process writes to stderr during the block appears after it; after a panic it does not.
    """
    with _turn, _held_back() as held:
        try:
            yield
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            if held is not None:
                os.ftruncate(held, 0)
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{where}: {failure} ({reason}): {remedy}") from None


@contextmanager
def _held_back() -> Iterator[int | None]:
    """Yields the descriptor of a file that takes the place of stderr; what it holds in the end goes to stderr.

    Yields None, and changes nothing, where stderr is closed or no file can be made.
    """
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.flush()
    with ExitStack() as stack:
        file = None
        with suppress(OSError):
            terminal = os.dup(STDERR)
            stack.callback(os.close, terminal)
            # Processes that are started meanwhile append to the file.
            file = stack.enter_context(tempfile.TemporaryFile("a+b", buffering=0))
        if file is None:
            yield None
            return
        try:
            os.dup2(file.fileno(), STDERR)
            yield file.fileno()
        finally:
            os.dup2(terminal, STDERR)
            file.seek(0)
            with suppress(OSError):
                while text := file.read(CHUNK):
                    os.write(STDERR, text)
