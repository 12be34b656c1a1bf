"""SPG (arXiv 2510.09541) with its own recipe.

    python -m gdsd_jax.train --config configs/baseline_spg.py:llada_sudoku --workdir runs/spg_llada_sudoku

After the colon: one of RUNS, MODEL_TASK. Hardware: the papers used 8 devices of 80 GB; not yet run here.
Published, in percent (plots of arXiv 2605.29398, best over settings):
Sudoku 88.2, Countdown 70.7, GSM8K 85.1, MATH500 41.8.
"""

from common import LLADA_RUNS, chosen, recipe

RUNS = LLADA_RUNS


def get_config(run="llada_sudoku"):
    model, task = chosen(run, RUNS)
    bound = {"negative": "eubo" if task == "countdown" else "mix", "mix_weight": 0.5}
    bound["eubo_beta"] = {"sudoku": 1.0, "countdown": 2.0}.get(task, 1.5)
    return recipe(model, task, "spg", learning_rate=3e-6, inner_updates=4, **bound, num_t=2, block_length=32)
