"""Turns panics of the tokenizers library into UserError, and keeps what the library prints about them off the terminal.

A regular expression that takes too many steps ends in a panic, an exception whose class no module exports and which is
no `Exception`. Before it is raised, the library writes lines of its own to the process's stderr, with a backtrace where
RUST_BACKTRACE is set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.stderr import held_back


@contextmanager
def panics_refused(where: os.PathLike, failure: str, remedy: str) -> Iterator[None]:
    """Raises UserError in the place of a panic in the block: "WHERE: FAILURE (what the panic says): REMEDY".

    What is written to stderr during the block appears after it, see `held_back`; after a panic it does not.
    """
    with held_back() as drop:
        try:
            yield
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            drop()
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{where}: {failure} ({reason}): {remedy}") from None
