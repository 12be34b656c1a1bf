"""The installed commands: `gdsd-NAME` does what `python -m gdsd_jax.NAME` does."""

import os
import runpy
import sys
from pathlib import Path

ELSEWHERE = {"plots": "telemetry.plots"}


def main() -> None:
    """Runs the command that the name of the script says; the entry point of all of them.

    The current directory goes onto Python's path, as `python -m` puts it there, so that a method, task or tracker of
    the user's own can be named `module:NAME`.
    """
    name = Path(sys.argv[0]).stem.removeprefix("gdsd-").replace("-", "_")
    sys.path.insert(0, os.getcwd())
    runpy.run_module(f"gdsd_jax.{ELSEWHERE.get(name, name)}", run_name="__main__", alter_sys=True)
