"""ESPO (arXiv 2512.03759) with its own recipe.

    python -m gdsd_jax.train --config configs/baseline_espo.py:llada_sudoku --workdir runs/espo_llada_sudoku

Behind the colon stands one of RUNS, model and task. `--config.checkpoint` names the model's Hugging Face directory.
What the paper's recipe leaves open (prompts per rollout, sampler, optimizer) is GDSD's. beta is between 1e-3 and 1e-2;
code trains all parameters at 1e-6.
Hardware: the papers used 8 devices of 80 GB for models of this size; not yet run here.
Published (best over settings, from GDSD's plots, arXiv 2605.29398): Sudoku 92.7, Countdown 82.0,
GSM8K 83.0, MATH500 43.4; Dream: Sudoku 72.3, Countdown 68.8.
"""

from gdsd_jax import config as settings
from gdsd_jax.runtime.errors import UserError

CHECKPOINTS = {"llada": "checkpoints/LLaDA-8B-Instruct", "dream": "checkpoints/Dream-v0-Instruct-7B"}
RUNS = ("llada_sudoku", "llada_countdown", "llada_gsm8k", "llada_math", "llada_code", "dream_sudoku", "dream_countdown")


def get_config(run="llada_sudoku"):
    if run not in RUNS:
        raise UserError(f"{run!r} is not one of the runs {', '.join(RUNS)}: change what follows the colon of --config")
    model, task = run.split("_")
    config = settings.default(checkpoint=CHECKPOINTS[model])
    with config.unlocked():
        config.task.name = task
        config.method = "espo"
        config.settings.espo = {"eps_low": 0.2, "eps_high": 0.2, "beta": 1e-3, "views": 2}
        config.inner_updates = 8
        config.optimizer.update(learning_rate=3e-6, warmup_updates=8)
        if task == "code":
            config.lora.rank = 0
            config.optimizer.learning_rate = 1e-6
        if model == "dream":
            config.sampler.update(block_length=256, strategy="entropy", top_p=0.95)
    return config
