"""GDSD-TLC on Countdown, Dream-v0-Instruct-7B.

    python -m gdsd_jax.train --config configs/dream_7b_countdown.py --workdir runs/dream_7b_countdown

`--config.checkpoint` names the model's Hugging Face directory, default `checkpoints/Dream-v0-Instruct-7B`.
Hardware: the authors used 8 devices for these 16 x 16 completions per rollout; not yet run here.
Published (arXiv 2605.29398, best over settings): 84.8 %.
"""

from gdsd_jax import config as settings


def get_config():
    config = settings.default(checkpoint="checkpoints/Dream-v0-Instruct-7B")
    with config.unlocked():
        config.task.name = "countdown"
        config.method = "gdsd_tlc"
        config.settings.gdsd_tlc = {"psi": 10.0, "beta": 3e-3, "views": 2}
        config.prompts_per_iteration, config.group_size, config.inner_updates = 16, 16, 8
        config.optimizer.update(learning_rate=1e-5, warmup_updates=8)
        config.sampler.update(block_length=256, strategy="entropy", top_p=0.95)
    return config
