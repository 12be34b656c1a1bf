"""GDSD on Countdown, LLaDA-8B-Instruct.

    python -m gdsd_jax.train --config configs/llada_8b_countdown.py --workdir runs/llada_8b_countdown

`--config.checkpoint` names the model's Hugging Face directory; the default is `checkpoints/LLaDA-8B-Instruct`.
Hardware: the authors used 8 devices for rollouts of 20 x 16 completions. Not yet run here.
Published (arXiv 2605.29398, best over settings): 84.0 %.
"""

from common import recipe


def get_config():
    return recipe("llada", "countdown", "gdsd", learning_rate=1e-5, psi=1.0, beta=3e-3, views=2)
