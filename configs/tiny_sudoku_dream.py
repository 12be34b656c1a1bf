"""The Dream-format twin of `tiny_sudoku`: grouped heads, biases, shifted logits, the entropy sampler.

    python -m gdsd_jax.train --config configs/tiny_sudoku_dream.py --workdir runs/tiny_dream

Hardware and start as there, in runs/start_dream. Expected accuracy: not measured.
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
        config.checkpoint = "runs/start_dream/merged"
        config.tiny.update(family="dream", num_kv_heads=2)
        config.sampler.update(strategy="entropy", threshold=None)
    return config
