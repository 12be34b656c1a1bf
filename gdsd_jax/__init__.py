"""Reinforcement learning for masked diffusion language models in JAX, on one code path from a CPU to TPU pods.

Start reading in `gdsd_jax.train`.
"""

import gc
import importlib
import sys

__version__ = "0.1.0"

# For `python -m gdsd_jax.COMMAND`: an interrupt shows no traceback even while the command is still being imported, and
# the garbage collector does not walk the growing number of modules until `gdsd_jax.runtime.front` runs the command.
if "-m" in sys.orig_argv and "".join(sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1]).startswith("gdsd_jax."):
    gc.disable()
    sys.excepthook = lambda *error: importlib.import_module("gdsd_jax.runtime.front").hook(*error)
