"""Runs a command of gdsd_jax together with a profiler server, from which launch/profile.sh gets its traces.

    python launch/with_profiler.py gdsd_jax.train --config configs/llada_8b_sudoku.py --workdir runs/llada

The server costs nothing until a trace is requested. It starts before the command, so it must not touch a device: on a
pod, `jax.distributed.initialize` has to come first.
"""

import os
import runpy
import sys

import jax

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python launch/with_profiler.py MODULE [ARGUMENT ...]")
    jax.profiler.start_server(int(os.environ.get("PROFILER_PORT", "9012")), requires_backend=False)
    del sys.argv[0]
    sys.path.insert(0, os.getcwd())
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
