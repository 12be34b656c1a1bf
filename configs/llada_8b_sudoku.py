"""GDSD on 4x4 Sudoku, LLaDA-8B-Instruct: the public demo.

    python -m gdsd_jax.train --config configs/llada_8b_sudoku.py --workdir runs/llada_8b_sudoku

`--config.checkpoint` names the model's Hugging Face directory, default `checkpoints/LLaDA-8B-Instruct`.
Hardware: the authors used one device for these 2 x 6 completions per rollout; not yet run here.
Published (arXiv 2605.29398, best over settings): 89.8 % of the empty cells, by a larger run than this demo.
"""

from gdsd_jax import config as settings


def get_config():
    config = settings.default(checkpoint="checkpoints/LLaDA-8B-Instruct")
    with config.unlocked():
        config.task.name = "sudoku"
        config.method = "gdsd"
        config.settings.gdsd = {"psi": 1.0, "beta": 1e-3, "views": 1}
        config.prompts_per_iteration, config.group_size, config.inner_updates = 2, 6, 8
        config.microbatch_rows = 6
        config.optimizer.update(learning_rate=3e-6, warmup_updates=8)
        config.sampler.update(steps=64)
    return config
