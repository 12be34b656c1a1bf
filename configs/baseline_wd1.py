"""wd1 (arXiv 2507.08838) with its own recipe.

    python -m gdsd_jax.train --config configs/baseline_wd1.py:llada_sudoku --workdir runs/wd1_llada_sudoku

After the colon: one of RUNS, MODEL_TASK. Hardware: the papers used 8 devices of 80 GB; not yet run here.
Published, in percent (plots of arXiv 2605.29398, best over settings):
Sudoku 76.4, Countdown 51.2, GSM8K 82.3, MATH500 39.8; Dream: Sudoku 39.2, Countdown 42.2.
"""

from common import DREAM_RUNS, LLADA_RUNS, chosen, recipe

RUNS = LLADA_RUNS + DREAM_RUNS


def get_config(run="llada_sudoku"):
    model, task = chosen(run, RUNS)
    shape = {"inner_updates": 8 if task == "sudoku" else 12, "group": 6, "microbatch_rows": 12}
    return recipe(model, task, "wd1", learning_rate=3e-6, **shape, positive_only=False, prompt_mask_rate=0.15)
