"""GDSD-TLC on Countdown, Dream-v0-Instruct-7B.

    python -m gdsd_jax.train --config configs/dream_7b_countdown.py --workdir runs/dream_7b_countdown

`--config.checkpoint` names the model's Hugging Face directory; the default is `checkpoints/Dream-v0-Instruct-7B`.
Hardware: the authors used 8 devices for rollouts of 16 x 16 completions. Not yet run here.
Published (arXiv 2605.29398, best over settings): 84.8 %.
"""

from common import recipe


def get_config():
    return recipe("dream", "countdown", "gdsd_tlc", learning_rate=1e-5, prompts=16, psi=10.0, beta=3e-3, views=2)
