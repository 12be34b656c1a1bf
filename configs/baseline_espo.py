"""ESPO (arXiv 2512.03759) with its own recipe.

    python -m gdsd_jax.train --config configs/baseline_espo.py:llada_sudoku --workdir runs/espo_llada_sudoku

After the colon: one of RUNS, MODEL_TASK. Hardware: the papers used 8 devices of 80 GB; not yet run here.
Published, in percent (plots of arXiv 2605.29398, best over settings):
Sudoku 92.7, Countdown 82.0, GSM8K 83.0, MATH500 43.4; Dream: Sudoku 72.3, Countdown 68.8.
"""

from common import DREAM_RUNS, LLADA_RUNS, chosen, recipe

RUNS = (*LLADA_RUNS, "llada_code", *DREAM_RUNS)


def get_config(run="llada_sudoku"):
    model, task = chosen(run, RUNS)
    rate = 1e-6 if task == "code" else 3e-6
    config = recipe(model, task, "espo", learning_rate=rate, eps_low=0.2, eps_high=0.2, beta=1e-3, views=2)
    config.lora.rank *= task != "code"
    return config
