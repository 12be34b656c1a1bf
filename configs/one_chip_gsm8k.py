"""GDSD on GSM8K with a model of 0.5 to 2 billion parameters, on one TPU chip (v5e, 16 GB; Colab and Kaggle have them).

    python -m gdsd_jax.train --config configs/one_chip_gsm8k.py:qwen3_lora --workdir runs/qwen3_gsm8k
    python -m gdsd_jax.plan --config configs/one_chip_gsm8k.py:qwen3_lora --topology v5e:1x1

The second command says, without a chip, whether the run fits. The words after the colon are those of `one_gpu_gsm8k`.
Expected score: not measured, as it has not yet run on a chip.
"""

from common import one_device


def get_config(run="qwen3_lora"):
    return one_device(run, "gsm8k", rows=8)
