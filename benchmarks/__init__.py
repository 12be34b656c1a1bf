"""Measures speed, memory and quality, mostly against plain PyTorch in the same run: `python -m benchmarks.sampler`.

The docstring of each module says what it measures and how to run it.
"""

import contextlib
import os
import sys
from typing import Any

from gdsd_jax.runtime import front


def _hook(kind: type[BaseException], error: BaseException, frames: Any) -> None:
    """Ends a bench with one line after Ctrl-C or a bad input, as commands end; a defect shows its traceback."""
    interrupted = any(isinstance(cause, KeyboardInterrupt) for cause in front.causes(error))
    stopped = interrupted or isinstance(error, BrokenPipeError)
    if not stopped and front.fault_of_the_user(error) is None:
        sys.__excepthook__(kind, error, frames)
        return
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(front.settle(error))


if "-m" in sys.orig_argv and "".join(sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1]).startswith("benchmarks."):
    sys.excepthook = _hook
