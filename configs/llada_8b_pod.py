"""GDSD on Countdown or Sudoku, LLaDA-8B-Instruct, on a slice of TPUs: the recipes of one machine, 20 x 16 completions.

    python -m gdsd_jax.train --config configs/llada_8b_pod.py:v5p-64_countdown --workdir /mnt/gdsd/runs/llada_countdown

Hardware: a slice of TPUs, named after the colon together with the task, one of RUNS. docs/pods_plan.md says which runs
fit their slice. None has been run.
Published (arXiv 2605.29398, best over settings, read from plots): Countdown 84.0, Sudoku 89.8 % of the empty cells.
"""

import common
import llada_8b_countdown as countdown
import llada_8b_sudoku as sudoku

SLICES, TASKS = common.SLICES | {"v6e-16": ("v6e:4x4", 16, "dots")}, ("countdown", "sudoku")
RUNS, ALL_PARAMETERS = common.runs_of(SLICES, TASKS), ("v5p-32", "v5e-8")  # the table of plans has these twice


def get_config(run="v5e-8_countdown"):
    return common.on_slice(run, SLICES, {"countdown": countdown, "sudoku": sudoku}, prompts=20)
