"""Compares the measurements of a run with the prediction of `gdsd_jax.plan`.

`python -m gdsd_jax.plan ... --json WORKDIR/plan.json` writes the plan to the workdir of the run, where it is read.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax

from gdsd_jax.config import TrainConfig
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.files import read_object, understood

FILE = "plan.json"


def read_plan(workdir: Path, config: TrainConfig) -> dict[str, Any] | None:
    """Returns the plan in `workdir`, or None if there is none.

    Raises:
      UserError: the plan is for another method, adapter, rollout or micro-batch than the run's, or cannot be read.
    """
    path = workdir / FILE
    if not path.is_file():
        return None
    advice = "plan again or remove the file"
    plan = read_object(path, advice)
    with understood(path, advice):
        for name in ("sampler", "update"):
            if name in plan:
                numbers = [plan[name]["peak_bytes"], plan[name]["seconds_roofline"] or 0.0]
                if not all(math.isfinite(number) and number >= 0 for number in numbers):
                    raise ValueError(f"{name} is planned with {numbers}")
    run = {
        "method": config.method,
        "lora_rank": config.lora.rank,
        "rows": config.prompts_per_iteration * config.group_size,
        "microbatch_rows": config.microbatch_rows,
    }
    for name, value in run.items():
        if plan.get(name) != value:
            raise UserError(f"{path} plans {name} {plan.get(name)}, the run has {value}: plan again or remove the file")
    return plan


def planned_sizes(workdir: Path) -> dict[str, Any]:
    """Returns the plan's values of the settings that a config may leave open; {} if `workdir` holds no plan.

    Raises:
      UserError: the plan cannot be read.
    """
    path = workdir / FILE
    if not path.is_file():
        return {}
    plan = read_object(path, "plan again or remove the file")
    return {name: plan[name] for name in ("microbatch_rows", "rollout_rows", "remat") if plan.get(name)}


def beside_plan(plan: dict[str, Any] | None, *, rollout: float, update: float) -> dict[str, float]:
    """Returns the measured memory and the numbers of the plan as metrics.

    `device/peak_bytes` is included if the device counts it. If there is a plan, each of its programs adds its peak
    bytes, its roofline seconds, and `share`: the roofline seconds over the measured seconds.

    Args:
      plan: the result of `read_plan`.
      rollout: measured seconds of a rollout.
      update: measured seconds of one inner update.
    """
    memory = jax.local_devices()[0].memory_stats() or {}
    metrics = {"device/peak_bytes": float(memory["peak_bytes_in_use"])} if "peak_bytes_in_use" in memory else {}
    for name, seconds in (("sampler", rollout), ("update", update)):
        if plan is not None and name in plan:
            metrics[f"plan/{name}_peak_bytes"] = float(plan[name]["peak_bytes"])
            if plan[name]["seconds_roofline"]:
                metrics[f"plan/{name}_seconds"] = plan[name]["seconds_roofline"]
                metrics[f"plan/{name}_share"] = plan[name]["seconds_roofline"] / seconds
    return metrics
