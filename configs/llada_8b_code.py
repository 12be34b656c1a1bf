"""GDSD-TLC on code, LLaDA-8B-Instruct.

    python -m gdsd_jax.train --config configs/llada_8b_code.py --workdir runs/llada_8b_code

`--config.checkpoint` names the model's Hugging Face directory; the default is `checkpoints/LLaDA-8B-Instruct`.
Hardware: the authors used 8 devices for rollouts of 30 x 16 completions. Not yet run here.
Published: the source of this recipe gives no number.
"""

from common import recipe


def get_config():
    return recipe("llada", "code", "gdsd_tlc", learning_rate=3e-6, prompts=30, psi=10.0, beta=5e-2, views=4)
