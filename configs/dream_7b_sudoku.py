"""GDSD-TLC on 4x4 Sudoku, Dream-v0-Instruct-7B.

    python -m gdsd_jax.train --config configs/dream_7b_sudoku.py --workdir runs/dream_7b_sudoku

`--config.checkpoint` names the model's Hugging Face directory, default `checkpoints/Dream-v0-Instruct-7B`.
Hardware: the authors used 8 devices for these 16 x 16 completions per rollout; not yet run here.
Published (arXiv 2605.29398, best over settings): 91.7 % of the empty cells.
"""

from gdsd_jax import config as settings


def get_config():
    config = settings.default(checkpoint="checkpoints/Dream-v0-Instruct-7B")
    with config.unlocked():
        config.task.name = "sudoku"
        config.method = "gdsd_tlc"
        config.settings.gdsd_tlc = {
            "psi": 1.0, "beta": 1e-3, "views": 2, "top_k": 8,
            "eps_low": 0.2, "eps_high": 0.2, "masking": "rollout_order_random", "block_length": 32,
        }
        config.prompts_per_iteration, config.group_size, config.inner_updates = 16, 16, 1
        config.optimizer.update(learning_rate=1e-5, warmup_updates=1)
        config.sampler.update(steps=128, block_length=256, strategy="entropy", top_p=0.95)
    return config
