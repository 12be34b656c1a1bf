"""GDSD-TLC on Countdown or Sudoku, Dream-v0-Instruct-7B, on a slice of TPUs: the recipes of one machine.

    python -m gdsd_jax.train --config configs/dream_7b_pod.py:v5p-64_countdown --workdir /mnt/gdsd/runs/dream_countdown

Hardware: a slice of TPUs, named after the colon together with the task, one of RUNS. docs/pods_plan.md says which runs
fit their slice. None has been run.
Published (arXiv 2605.29398, best over settings, read from plots): Countdown 84.8, Sudoku 91.7 % of the empty cells.
"""

import common
import dream_7b_countdown as countdown
import dream_7b_sudoku as sudoku

SLICES, TASKS = common.SLICES, ("countdown", "sudoku")
RUNS = common.runs_of(SLICES, TASKS)


def get_config(run="v5e-8_countdown"):
    return common.on_slice(run, SLICES, {"countdown": countdown, "sudoku": sudoku}, prompts=16)
