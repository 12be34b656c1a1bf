"""GDSD on 4x4 Sudoku, LLaDA-8B-Instruct: the public demo.

    python -m gdsd_jax.train --config configs/llada_8b_sudoku.py --workdir runs/llada_8b_sudoku

`--config.checkpoint` names the model's Hugging Face directory; the default is `checkpoints/LLaDA-8B-Instruct`.
Hardware: the authors used one device for rollouts of 2 x 6 completions. Not yet run here.
Published (arXiv 2605.29398, best over settings): 89.8 % of the empty cells, by a larger run than this demo.
"""

from common import recipe


def get_config():
    shape = {"prompts": 2, "group": 6, "microbatch_rows": 6}
    config = recipe("llada", "sudoku", "gdsd", learning_rate=3e-6, **shape, psi=1.0, beta=1e-3, views=1)
    config.sampler.steps = 64
    return config
