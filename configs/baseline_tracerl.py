"""TraceRL (arXiv 2509.06949) with its own recipe, without the value model.

    python -m gdsd_jax.train --config configs/baseline_tracerl.py:llada_math --workdir runs/tracerl_llada_math

Behind the colon stands one of RUNS, model and task. `--config.checkpoint` names the model's Hugging Face directory.
What the paper's recipe leaves open (prompts per rollout, sampler, optimizer) is GDSD's. One inner update, since the
source names none. A row has up to 32 views of its 256 tokens: micro-batches are small.
Hardware: the papers used 8 devices of 80 GB for models of this size; not yet run here.
Published: no number for these models in the source of this recipe.
"""

from gdsd_jax import config as settings
from gdsd_jax.runtime.errors import UserError

CHECKPOINTS = {"llada": "checkpoints/LLaDA-8B-Instruct", "dream": "checkpoints/Dream-v0-Instruct-7B"}
RUNS = ("llada_math", "dream_math")


def get_config(run="llada_math"):
    if run not in RUNS:
        raise UserError(f"{run!r} is not one of the runs {', '.join(RUNS)}: change what follows the colon of --config")
    model, task = run.split("_")
    config = settings.default(checkpoint=CHECKPOINTS[model])
    with config.unlocked():
        config.task.name = task
        config.method = "tracerl"
        config.settings.tracerl = {"eps_low": 0.2, "eps_high": 0.2, "beta": 0.01, "shrink": 8}
        config.group_size, config.inner_updates, config.microbatch_rows = 8, 1, 1
        config.sampler.temperature = 0.8
        config.optimizer.learning_rate = 1e-6
        if model == "dream":
            config.sampler.update(block_length=256, strategy="entropy", top_p=0.95)
    return config
