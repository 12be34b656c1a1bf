"""DMPO (arXiv 2510.08233) with its own recipe.

    python -m gdsd_jax.train --config configs/baseline_dmpo.py:llada_sudoku --workdir runs/dmpo_llada_sudoku

Behind the colon stands one of RUNS, model and task. `--config.checkpoint` names the model's Hugging Face directory.
What the paper's recipe leaves open (prompts per rollout, sampler, optimizer) is GDSD's.
Hardware: the papers used 8 devices of 80 GB for models of this size; not yet run here.
Published (best over settings, from GDSD's plots, arXiv 2605.29398): Sudoku 32.8, Countdown 82.8,
GSM8K 85.2, MATH500 42.8.
"""

from gdsd_jax import config as settings
from gdsd_jax.runtime.errors import UserError

CHECKPOINTS = {"llada": "checkpoints/LLaDA-8B-Instruct"}
RUNS = ("llada_sudoku", "llada_countdown", "llada_gsm8k", "llada_math")


def get_config(run="llada_sudoku"):
    if run not in RUNS:
        raise UserError(f"{run!r} is not one of the runs {', '.join(RUNS)}: change what follows the colon of --config")
    model, task = run.split("_")
    config = settings.default(checkpoint=CHECKPOINTS[model])
    with config.unlocked():
        config.task.name = task
        config.method = "dmpo"
        config.settings.dmpo = {"alpha": 0.04, "negative_weight": 1.0, "pairs": 2}
        config.inner_updates = 8
        config.sampler.update(temperature=0.2, steps=128)
        config.optimizer.update(learning_rate=1e-6, warmup_updates=8)
    return config
