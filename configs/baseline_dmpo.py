"""DMPO (arXiv 2510.08233) with its own recipe.

    python -m gdsd_jax.train --config configs/baseline_dmpo.py:llada_sudoku --workdir runs/dmpo_llada_sudoku

After the colon: one of RUNS, MODEL_TASK. Hardware: the papers used 8 devices of 80 GB; not yet run here.
Published, in percent (plots of arXiv 2605.29398, best over settings):
Sudoku 32.8, Countdown 82.8, GSM8K 85.2, MATH500 42.8.
"""

from common import LLADA_RUNS, chosen, recipe

RUNS = LLADA_RUNS


def get_config(run="llada_sudoku"):
    model, task = chosen(run, RUNS)
    config = recipe(model, task, "dmpo", learning_rate=1e-6, alpha=0.04, negative_weight=1.0, pairs=2)
    config.sampler.update(temperature=0.2, steps=128)
    return config
