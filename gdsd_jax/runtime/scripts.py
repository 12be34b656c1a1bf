"""The installed commands: `gdsd-NAME` does what `python -m gdsd_jax.NAME` does."""

import gc
import importlib
import os
import runpy
import sys
from pathlib import Path

ELSEWHERE = {"plots": "telemetry.plots"}


def main() -> None:
    """Runs the command that the script is named after; all installed commands have this entry point.

    The current directory is put on Python's path, as `python -m` does, so that a user's own method, task or tracker can
    be named `module:NAME`.
    """
    name = Path(sys.argv[0]).stem.removeprefix("gdsd-").replace("-", "_")
    sys.path.insert(0, os.getcwd())
    # As `gdsd_jax` itself does for `python -m`: no traceback while the command is still being imported.
    sys.excepthook = lambda *error: importlib.import_module("gdsd_jax.runtime.front").hook(*error)
    gc.disable()  # until `gdsd_jax.runtime.front` runs the command
    runpy.run_module(f"gdsd_jax.{ELSEWHERE.get(name, name)}", run_name="__main__", alter_sys=True)
