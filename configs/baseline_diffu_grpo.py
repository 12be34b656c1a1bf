"""diffu-GRPO (d1, arXiv 2504.12216) with its own recipe.

    python -m gdsd_jax.train --config configs/baseline_diffu_grpo.py:llada_sudoku --workdir runs/diffu_grpo_llada_sudoku

After the colon: one of RUNS, MODEL_TASK. Hardware: the papers used 8 devices of 80 GB; not yet run here.
Published, in percent (plots of arXiv 2605.29398, best over settings):
Sudoku 26.7, Countdown 37.1, GSM8K 81.2, MATH500 41.7; Dream: Sudoku 69.7, Countdown 37.5.
"""

from common import DREAM_RUNS, LLADA_RUNS, chosen, recipe

RUNS, CLIP = LLADA_RUNS + DREAM_RUNS, {"eps_low": 0.5, "eps_high": 0.5, "beta": 0.04}


def get_config(run="llada_sudoku"):
    model, task = chosen(run, RUNS)
    shape = {"inner_updates": 8 if task in ("sudoku", "countdown") else 12, "group": 6, "microbatch_rows": 12}
    config = recipe(model, task, "diffu_grpo", learning_rate=3e-6, **shape, **CLIP, prompt_mask_rate=0.15)
    config.optimizer.weight_decay = 0.1
    return config
