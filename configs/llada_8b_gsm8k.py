"""GDSD on GSM8K, LLaDA-8B-Instruct.

    python -m gdsd_jax.train --config configs/llada_8b_gsm8k.py --workdir runs/llada_8b_gsm8k

`--config.checkpoint` names the model's Hugging Face directory; the default is `checkpoints/LLaDA-8B-Instruct`.
Hardware: the authors used 8 devices for rollouts of 20 x 16 completions. Not yet run here.
Published (arXiv 2605.29398, best over settings): 86.4 % on the test split.
"""

from common import recipe


def get_config():
    return recipe("llada", "gsm8k", "gdsd", learning_rate=3e-6, psi=10.0, beta=1e-3, views=2)
