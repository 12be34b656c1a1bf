"""GDSD on GSM8K with published models of 0.5 to 8 billion parameters, on one TPU chip, one host or a small pod.

    python -m gdsd_jax.plan --config configs/sizes_pod.py:0.6b-v5e-1_gsm8k --topology v5e:1x1

After the colon: one of RUNS, SIZE-SLICE_gsm8k. docs/pods_plan.md says which runs fit their slice. On one chip of 16 GB
the models of 7 and 8 billion parameters have their frozen matrices in 8 bits. None has been run.
"""

import common

SLICES = {f"{size}-v5e-1": ("v5e:1x1", 8 if size < "4b" else 2) for size in common.SIZES}
SLICES |= {f"{size}-{kind}": common.SLICES[kind] for kind in ("v5e-8", "v5p-32") for size in common.SIZES}
TASKS, RUNS = ("gsm8k",), common.runs_of(SLICES, ("gsm8k",))


def get_config(run="0.6b-v5e-1_gsm8k"):
    place = common.chosen(run, RUNS)[0]
    model = common.SIZES[place.split("-")[0]] + "_lora"
    weights = "int8" if place in ("7b-v5e-1", "8b-v5e-1") else "stored"
    return common.one_device(model, "gsm8k", rows=SLICES[place][1], runs=[model], weights=weights)
