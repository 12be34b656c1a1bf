"""GDSD-TLC on Countdown or Sudoku, Dream-v0-Instruct-7B, on a slice of TPUs.

    python -m gdsd_jax.train --config configs/dream_7b_pod.py:v5p-64_countdown --workdir /mnt/gdsd/runs/dream_countdown
    python -m gdsd_jax.plan --config configs/dream_7b_pod.py:v5p-64_countdown --topology v5p:2x4x4

Hardware: behind the colon stand the accelerator type and the task. Types of v5p count cores, two to a chip.

    v5e-8     v5e:2x4      8 chips, one host: what most people can rent
    v5e-64    v5e:8x8     64 chips
    v5p-32    v5p:2x2x4   16 chips
    v5p-64    v5p:2x4x4   32 chips
    v5p-128   v5p:4x4x4   64 chips

The recipes are those of configs/dream_7b_countdown.py and configs/dream_7b_sudoku.py; each shard of the mesh holds at
least one of the 16 x 16 completions of a rollout, and one of each micro-batch. What `plan` says of memory and time
stands in docs/pods_plan.md; none of them has been run.
Published (arXiv 2605.29398, best over settings, from GDSD's plots): Countdown 84.8, Sudoku 91.7 % of the empty cells.
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
}
TASKS = ("countdown", "sudoku")


def get_config(run="v5e-8_countdown"):
    slice_name, _, task = run.partition("_")
    if slice_name not in SLICES or task not in TASKS:
        raise UserError(
            f"{run!r} is not SLICE_TASK with a slice of {', '.join(SLICES)} and a task of {', '.join(TASKS)}: "
            "change what follows the colon of --config"
        )
    config = settings.default(checkpoint="checkpoints/Dream-v0-Instruct-7B")
    with config.unlocked():
        config.task.name = task
        config.method = "gdsd_tlc"
        config.settings.gdsd_tlc = {"psi": 10.0, "beta": 3e-3, "views": 2}
        config.prompts_per_iteration, config.group_size, config.inner_updates = 16, 16, 8
        config.microbatch_rows = SLICES[slice_name][1]
        config.optimizer.update(learning_rate=1e-5, warmup_updates=8)
        config.sampler.update(block_length=256, strategy="entropy", top_p=0.95)
        if task == "sudoku":
            config.settings.gdsd_tlc.update(
                psi=1.0, beta=1e-3, top_k=8, eps_low=0.2, eps_high=0.2, masking="rollout_order_random", block_length=32
            )
            config.inner_updates = config.optimizer.warmup_updates = 1
            config.sampler.steps = 128
    return config
