"""SPG (arXiv 2510.09541) with its own recipe.

    python -m gdsd_jax.train --config configs/baseline_spg.py:llada_sudoku --workdir runs/spg_llada_sudoku

Behind the colon stands one of RUNS, model and task. `--config.checkpoint` names the model's Hugging Face directory.
What the paper's recipe leaves open (prompts per rollout, sampler, optimizer) is GDSD's.
Hardware: the papers used 8 devices of 80 GB for models of this size; not yet run here.
Published (best over settings, from GDSD's plots, arXiv 2605.29398): Sudoku 88.2, Countdown 70.7,
GSM8K 85.1, MATH500 41.8.
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
        config.method = "spg"
        config.settings.spg = {"negative": "mix", "eubo_beta": 1.5, "mix_weight": 0.5, "num_t": 2, "block_length": 32}
        if task == "sudoku":
            config.settings.spg.eubo_beta = 1.0
        if task == "countdown":
            config.settings.spg.update(negative="eubo", eubo_beta=2.0)
        config.inner_updates = 4
        config.optimizer.update(learning_rate=3e-6, warmup_updates=4)
    return config
