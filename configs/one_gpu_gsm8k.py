"""GDSD on GSM8K with a model of 0.5 to 2 billion parameters, on one GPU.

    python -m gdsd_jax.train --config configs/one_gpu_gsm8k.py:qwen3_lora --workdir runs/qwen3_gsm8k

Hardware: one GPU of 24 GB for adapters of the 0.6B model, 80 GB for all its parameters; not yet run there. The word
after the colon is one of SMALL_RUNS of `common`: model and adapters or all parameters. `--config.checkpoint` names the
model's directory. Expected score: not measured.
"""

from common import one_device


def get_config(run="qwen3_lora"):
    return one_device(run, "gsm8k", rows=16)
