"""GDSD-TLC on code, LLaDA-8B-Instruct.

    python -m gdsd_jax.train --config configs/llada_8b_code.py --workdir runs/llada_8b_code

`--config.checkpoint` names the model's Hugging Face directory, default `checkpoints/LLaDA-8B-Instruct`.
Hardware: the authors used 8 devices for these 30 x 16 completions per rollout; not yet run here.
Published (arXiv 2605.29398, best over settings): none in the source of this recipe.
"""

from gdsd_jax import config as settings


def get_config():
    config = settings.default(checkpoint="checkpoints/LLaDA-8B-Instruct")
    with config.unlocked():
        config.task.name = "code"
        config.method = "gdsd_tlc"
        config.settings.gdsd_tlc = {"psi": 10.0, "beta": 5e-2, "views": 4}
        config.prompts_per_iteration, config.group_size, config.inner_updates = 30, 16, 8
        config.optimizer.update(learning_rate=3e-6, warmup_updates=8)
    return config
