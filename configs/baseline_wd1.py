"""wd1 (arXiv 2507.08838) with its own recipe.

    python -m gdsd_jax.train --config configs/baseline_wd1.py:llada_sudoku --workdir runs/wd1_llada_sudoku

Behind the colon stands one of RUNS, model and task. `--config.checkpoint` names the model's Hugging Face directory.
What the paper's recipe leaves open (prompts per rollout, sampler, optimizer) is GDSD's.
Hardware: the papers used 8 devices of 80 GB for models of this size; not yet run here.
Published (best over settings, from GDSD's plots, arXiv 2605.29398): Sudoku 76.4, Countdown 51.2,
GSM8K 82.3, MATH500 39.8; Dream: Sudoku 39.2, Countdown 42.2.
"""

from gdsd_jax import config as settings
from gdsd_jax.runtime.errors import UserError

CHECKPOINTS = {"llada": "checkpoints/LLaDA-8B-Instruct", "dream": "checkpoints/Dream-v0-Instruct-7B"}
RUNS = ("llada_sudoku", "llada_countdown", "llada_gsm8k", "llada_math", "dream_sudoku", "dream_countdown")


def get_config(run="llada_sudoku"):
    if run not in RUNS:
        raise UserError(f"{run!r} is not one of the runs {', '.join(RUNS)}: change what follows the colon of --config")
    model, task = run.split("_")
    config = settings.default(checkpoint=CHECKPOINTS[model])
    with config.unlocked():
        config.task.name = task
        config.method = "wd1"
        config.settings.wd1 = {"positive_only": False, "prompt_mask_rate": 0.15}
        config.group_size, config.microbatch_rows = 6, 12
        config.inner_updates = 8 if task == "sudoku" else 12
        config.optimizer.update(learning_rate=3e-6, warmup_updates=config.inner_updates)
        if model == "dream":
            config.sampler.update(block_length=256, strategy="entropy", top_p=0.95)
    return config
