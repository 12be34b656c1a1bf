"""GDSD on GSM8K with a model of 0.5 to 2 billion parameters, on one TPU chip (v5e, 16 GB; Colab and Kaggle have them).

    python -m gdsd_jax.train --config configs/one_chip_gsm8k.py:qwen3_lora --workdir runs/qwen3_gsm8k
    python -m gdsd_jax.plan --config configs/one_chip_gsm8k.py:qwen3_lora --topology v5e:1x1

The second command says, without a chip, whether the run fits; docs/planning.md has what it says. The words after the
colon are those of `one_gpu_gsm8k`. The two moments of AdamW do not fit for all parameters of the 0.6B model, so that
`qwen3_full` takes Lion, with a third of AdamW's learning rate (arXiv 2302.06675), and micro-batches of 2 rows.
Expected score: not measured, as it has not yet run on a chip.
"""

from common import one_device


def get_config(run="qwen3_lora"):
    large = run == "qwen3_full"
    return one_device(run, "gsm8k", rows=2 if large else 8, lion=large)
