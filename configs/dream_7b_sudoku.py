"""GDSD-TLC on 4x4 Sudoku, Dream-v0-Instruct-7B.

    python -m gdsd_jax.train --config configs/dream_7b_sudoku.py --workdir runs/dream_7b_sudoku

`--config.checkpoint` names the model's Hugging Face directory; the default is `checkpoints/Dream-v0-Instruct-7B`.
Hardware: the authors used 8 devices for rollouts of 16 x 16 completions. Not yet run here.
Published (arXiv 2605.29398, best over settings): 91.7 % of the empty cells.
"""

from common import recipe


def get_config():
    method = {"psi": 1.0, "beta": 1e-3, "views": 2, "top_k": 8, "eps_low": 0.2, "eps_high": 0.2}
    order = {"masking": "rollout_order_random", "block_length": 32}
    config = recipe("dream", "sudoku", "gdsd_tlc", learning_rate=1e-5, inner_updates=1, prompts=16, **method, **order)
    config.sampler.steps = 128
    return config
