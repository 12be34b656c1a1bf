"""GDSD on GSM8K with a model of 0.5 to 2 billion parameters, on one GPU.

    python -m gdsd_jax.train --config configs/one_gpu_gsm8k.py:qwen3_lora --workdir runs/qwen3_gsm8k

After the colon: one of `common.SMALL_RUNS`, a model with `lora` (adapters) or `full` (all parameters).
`--config.checkpoint` names the model's Hugging Face directory.
Hardware: one GPU, of 24 GB for adapters of the 0.6B model, of 80 GB for all its parameters. Not yet run there.
Expected score: not measured.
"""

from common import one_device


def get_config(run="qwen3_lora"):
    return one_device(run, "gsm8k", rows=16)
