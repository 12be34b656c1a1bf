"""coupled-GRPO (DiffuCoder, arXiv 2506.20639) with its own recipe.

    python -m gdsd_jax.train --config configs/baseline_coupled_grpo.py:dream_code --workdir runs/coupled_grpo_dream_code

Behind the colon stands one of RUNS, model and task. `--config.checkpoint` names the model's Hugging Face directory.
What the paper's recipe leaves open (prompts per rollout, sampler, optimizer) is GDSD's.
The model has the architecture of Dream.
Hardware: the papers used 8 devices of 80 GB for models of this size; not yet run here.
Published: no number in the source of this recipe.
"""

from gdsd_jax import config as settings
from gdsd_jax.runtime.errors import UserError

CHECKPOINTS = {"dream": "checkpoints/DiffuCoder-7B-Instruct"}
RUNS = ("dream_code",)


def get_config(run="dream_code"):
    if run not in RUNS:
        raise UserError(f"{run!r} is not one of the runs {', '.join(RUNS)}: change what follows the colon of --config")
    model, task = run.split("_")
    config = settings.default(checkpoint=CHECKPOINTS[model])
    with config.unlocked():
        config.task.name = task
        config.method = "coupled_grpo"
        config.settings.coupled_grpo = {"eps_low": 0.5, "eps_high": 0.5, "beta": 0.01}
        config.group_size, config.inner_updates, config.microbatch_rows = 10, 2, 10
        config.optimizer.update(learning_rate=1e-6, warmup_updates=2)
        config.sampler.update(block_length=256, strategy="entropy", top_p=0.95)
    return config
