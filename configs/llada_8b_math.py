"""GDSD on MATH, LLaDA-8B-Instruct.

    python -m gdsd_jax.train --config configs/llada_8b_math.py --workdir runs/llada_8b_math

`--config.checkpoint` names the model's Hugging Face directory; the default is `checkpoints/LLaDA-8B-Instruct`.
Hardware: the authors used 8 devices for rollouts of 16 x 16 completions. Not yet run here.
Published (arXiv 2605.29398, best over settings): 44.6 % on MATH500.
"""

from common import recipe


def get_config():
    return recipe("llada", "math", "gdsd", learning_rate=1e-5, prompts=16, psi=10.0, beta=1e-4, views=2)
