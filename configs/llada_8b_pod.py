"""GDSD on Countdown or Sudoku, LLaDA-8B-Instruct, on a slice of TPUs.

    python -m gdsd_jax.train --config configs/llada_8b_pod.py:v5p-64_countdown --workdir /mnt/gdsd/runs/llada_countdown
    python -m gdsd_jax.plan --config configs/llada_8b_pod.py:v5p-64_countdown --topology v5p:2x4x4

Hardware: behind the colon stand the accelerator type and the task. Types of v5p count cores, two to a chip.

    v5e-8     v5e:2x4      8 chips, one host: what most people can rent
    v5e-64    v5e:8x8     64 chips
    v5p-32    v5p:2x2x4   16 chips
    v5p-64    v5p:2x4x4   32 chips
    v5p-128   v5p:4x4x4   64 chips
    v6e-16    v6e:4x4     16 chips

The recipes are those of configs/llada_8b_countdown.py and configs/llada_8b_sudoku.py with 20 x 16 completions per
rollout; each shard of the mesh holds at least one of them, and one of each micro-batch. What `plan` says of memory and
time stands in docs/pods_plan.md; none of them has been run.
Published (arXiv 2605.29398, best over settings, from GDSD's plots): Countdown 84.0, Sudoku 89.8 % of the empty cells.
"""

from gdsd_jax import config as settings
from gdsd_jax.runtime.errors import UserError

# Topology, and rows of a micro-batch: at least one per chip, and no fewer than a group.
SLICES = {
    "v5e-8": ("v5e:2x4", 16),
    "v5e-64": ("v5e:8x8", 64),
    "v5p-32": ("v5p:2x2x4", 16),
    "v5p-64": ("v5p:2x4x4", 32),
    "v5p-128": ("v5p:4x4x4", 64),
    "v6e-16": ("v6e:4x4", 16),
}
# Where the table of plans also says what training all parameters takes.
ALL_PARAMETERS = ("v5p-32", "v5e-8")
TASKS = ("countdown", "sudoku")


def get_config(run="v5e-8_countdown"):
    slice_name, _, task = run.partition("_")
    if slice_name not in SLICES or task not in TASKS:
        raise UserError(
            f"{run!r} is not SLICE_TASK with a slice of {', '.join(SLICES)} and a task of {', '.join(TASKS)}: "
            "change what follows the colon of --config"
        )
    config = settings.default(checkpoint="checkpoints/LLaDA-8B-Instruct")
    with config.unlocked():
        config.task.name = task
        config.method = "gdsd"
        config.settings.gdsd = {"psi": 1.0, "beta": 3e-3, "views": 2}
        config.prompts_per_iteration, config.group_size, config.inner_updates = 20, 16, 8
        config.microbatch_rows = SLICES[slice_name][1]
        config.optimizer.update(learning_rate=1e-5, warmup_updates=8)
        if task == "sudoku":
            config.settings.gdsd.update(beta=1e-3, views=1)
            config.optimizer.learning_rate = 3e-6
            config.sampler.steps = 64
    return config
