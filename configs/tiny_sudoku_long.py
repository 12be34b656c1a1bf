"""The embedded model with time to learn: as `tiny_sudoku`, a longer start and a longer run.

    python -m gdsd_jax.train --config configs/tiny_sudoku_long.py --workdir runs/tiny_long

Hardware: two CPU cores, about half an hour. Expected: see the results table in the README.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

_spec = importlib.util.spec_from_file_location("tiny_sudoku", Path(__file__).with_name("tiny_sudoku.py"))
_twin = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_twin)


def get_config() -> ConfigDict:
    config = _twin.get_config()
    with config.unlocked():
        config.checkpoint = "runs/start_long/merged"
        config.task.train_rows = 32768
        config.sft.update(steps=6000, until=0.0)
        config.sft.optimizer.schedule = "cosine"
        # So close to the optimum the noise of larger steps undoes what they learn.
        config.optimizer.learning_rate = 2.5e-4
        config.iterations = 96
    return config
