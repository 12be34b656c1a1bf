"""GDSD on MBPP with a coding model of half a billion parameters, on one GPU.

    python -m gdsd_jax.train --config configs/one_gpu_code.py:coder_lora --workdir runs/coder_mbpp

Hardware, words after the colon and expected score: as in `one_gpu_gsm8k`.
"""

from common import one_device


def get_config(run="coder_lora"):
    return one_device(run, "code", rows=16)
