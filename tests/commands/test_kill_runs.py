"""Kills a few runs at random moments; `tests/kill_runs.py` kills many, of every command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_killed_and_terminated_runs_end_as_the_undisturbed_one(tmp_path):
    script = Path(__file__).parents[1] / "kill_runs.py"
    command = [sys.executable, script, "--kills=2", "--terms=1", "--commands=train", f"--keep={tmp_path / 'runs'}"]
    # The script has settings of its own for compiling.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = map(json.loads, done.stdout.splitlines())
    assert (found["kills"], found["terms"], found["failures"]) == (2, 1, 0) and found["starts"] >= 4
