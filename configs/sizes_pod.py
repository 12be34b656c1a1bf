"""GDSD on GSM8K with published models of 0.5 to 8 billion parameters, on one TPU chip, one host or a small pod.

    python -m gdsd_jax.plan --config configs/sizes_pod.py:0.6b-v5e-1_gsm8k --topology v5e:1x1

After the colon: one of RUNS, SIZE-SLICE_gsm8k. docs/pods_plan.md says which runs fit their slice. On one chip of 16 GB
models of 4 billion parameters and more take micro-batches of 2 rows, and those of 7 and 8 billion have their frozen
matrices in 8 bits. None has been run.
"""

import common

MODELS = {"0.5b": "coder", "0.6b": "qwen3", "1.5b": "fastdllm", "1.7b": "sdar", "4b": "sdar4b"}
MODELS |= {"7b": "dream", "8b": "llada"}
_TYPES = {"v5e-1": ("v5e:1x1", 8)} | {name: common.SLICES[name] for name in ("v5e-8", "v5p-32")}
SLICES, TASKS = {f"{size}-{kind}": place for size in MODELS for kind, place in _TYPES.items()}, ("gsm8k",)
SLICES |= {f"{size}-v5e-1": ("v5e:1x1", 2) for size in ("4b", "7b", "8b")}
RUNS = common.runs_of(SLICES, TASKS)
IN_8_BITS = ("7b-v5e-1", "8b-v5e-1")


def get_config(run="0.6b-v5e-1_gsm8k"):
    place = common.chosen(run, RUNS)[0]
    size = place.split("-")[0]
    runs = [f"{model}_lora" for model in MODELS.values()]
    config = common.one_device(f"{MODELS[size]}_lora", "gsm8k", rows=SLICES[place][1], runs=runs)
    if place in IN_8_BITS:
        config.model.weights = "int8"
    return config
