"""Searches for a mesh on a slice, what to recompute, and the micro-batch and rollout that fit, as the compiler decides.

Meshes are tried in ascending order of the bytes that a chip sends, by estimate. On each mesh, the backward pass that
keeps the outputs of products is tried first. The micro-batch is the largest that fits. A rollout that does not fit is
cut into parts, and one that fits gets more prompts, up to the size from which its passes are bound by their products.
Sizes are taken to fit if temporaries in proportion to them do, until the compiler refuses one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from gdsd_jax import hub
from gdsd_jax.config import TrainConfig
from gdsd_jax.runtime.sharding import MeshConfig
from gdsd_jax.training.fit import ENOUGH_TOKENS

REMATS = ("dots", "full")  # from the faster one
Measure = Callable[[TrainConfig, str], dict[str, Any]]
Report = Callable[[TrainConfig, str, dict[str, Any]], None]


class OutOfCompilations(Exception):
    """Signals that the bound on compilations is reached; the search returns the best config so far."""


def meshes(config: TrainConfig, chips: int) -> list[MeshConfig]:
    """Returns the meshes that divide model, rollout and chips, sorted by what a chip sends per forward pass.

    By the estimate, a chip gathers the other shards of every weight in its slice along the tensor axis, and sends the
    activations of its rows around the tensor axis twice per layer.
    """
    model = hub.architecture(config.checkpoint, config.overrides)
    rows = config.prompts_per_iteration * config.group_size
    updated = config.update_rows or rows
    tokens = max(config.prompt_buckets) + config.sampler.completion_length
    layer = 4 * model.hidden_size**2 + 3 * model.hidden_size * model.intermediate_size
    divisors = [size for size in range(1, chips + 1) if chips % size == 0]

    def sent(mesh: MeshConfig) -> float:
        weights = layer / mesh.tensor * (mesh.fsdp - 1) / mesh.fsdp
        passed = 4 * rows / (mesh.data * mesh.fsdp) * tokens * model.hidden_size * (mesh.tensor - 1) / mesh.tensor
        return weights + passed

    found = [
        MeshConfig(data, chips // (data * tensor), tensor)
        for data in divisors
        for tensor in divisors
        if chips % (data * tensor) == 0
        and rows % (chips // tensor) == updated % (chips // tensor) == 0
        and all(size % tensor == 0 for size in (model.num_heads, model.intermediate_size))
        and model.hidden_size % (chips // (data * tensor)) == 0
    ]
    return sorted(found, key=sent)


def search(
    config: TrainConfig, chips: int, measure: Measure, tried: Report, *, compilations: int, sampler: bool = True
) -> TrainConfig | None:
    """Returns the config with the suggested mesh, remat, micro-batch, rollout parts and prompts.

    If no part of a rollout fits, the smallest is returned; if no update fits, None.

    Args:
      measure: compiles the named program of a config and returns its report.
      tried: is called with the config, the program's name and the report after each compilation.
      compilations: the most compilations to make.
      sampler: whether the rollout has to fit too, or the update alone.
    """
    count = 0

    def compiled(config: TrainConfig, name: str) -> dict[str, Any]:
        nonlocal count
        if count == compilations:
            raise OutOfCompilations
        count += 1
        report = measure(config, name)
        tried(config, name, report)
        return report

    def grow(config: TrainConfig, name: str, report: dict[str, Any], larger: Sequence[TrainConfig]) -> TrainConfig:
        """Returns the last of `larger`, in ascending order of size, with which program `name` fits."""
        room = report["hbm_bytes"] - report["peak_bytes"] + report["temporary_bytes"]
        growth = lambda other: _size(other, name) / _size(config, name)  # noqa: E731
        choices = [other for other in larger if report["temporary_bytes"] * growth(other) <= room]
        while choices and not compiled(choices[-1], name)["fits"]:
            choices.pop()
        return choices[-1] if choices else config

    best = None
    try:
        for mesh, remat in itertools.product(meshes(config, chips), REMATS):
            some = _microbatches(config, mesh)
            start = dataclasses.replace(config, mesh=mesh, microbatch_rows=some[0])
            start = dataclasses.replace(start, model=dataclasses.replace(config.model, remat=remat))
            update = compiled(start, "update")
            if update["fits"]:
                best = start
                break
        if best is None:
            return None
        best = grow(best, "update", update, [dataclasses.replace(best, microbatch_rows=n) for n in some[1:]])
        if not sampler:
            return best
        rollout = compiled(best, "sampler")
        if rollout["fits"]:
            return grow(best, "sampler", rollout, _more_prompts(best))
        for rows in _parts(best):
            best = dataclasses.replace(best, rollout_rows=rows)
            if compiled(best, "sampler")["fits"]:
                break
    except OutOfCompilations:
        pass
    return best


def _size(config: TrainConfig, name: str) -> int:
    """Returns the rows of one execution of a program."""
    rows = config.prompts_per_iteration * config.group_size
    return config.microbatch_rows if name == "update" else config.rollout_rows or rows


def _multiples(total: int, unit: int) -> list[int]:
    """Returns the divisors of `total` that are multiples of `unit`, in ascending order."""
    return [n for n in range(unit, total + 1, unit) if total % n == 0]


def _microbatches(config: TrainConfig, mesh: MeshConfig) -> list[int]:
    """Returns the micro-batches that spread over the mesh, in ascending order; only whole groups if there are such."""
    total = config.update_rows or config.prompts_per_iteration * config.group_size
    shards = mesh.data * mesh.fsdp
    return _multiples(total, math.lcm(shards, config.group_size)) or _multiples(total, shards)


def _parts(config: TrainConfig) -> list[int]:
    """Returns smaller and smaller rows of a part of a rollout, of whole groups that spread over the mesh.

    Each has at most half of the rows of the one before, so that few are compiled.
    """
    rows, group, refill = config.prompts_per_iteration * config.group_size, config.group_size, config.refill
    further = refill.prompts * group if refill.rounds and refill.prompts else 0
    found, last = [], config.rollout_rows or rows
    for part in reversed(_multiples(rows, math.lcm(group, config.mesh.data * config.mesh.fsdp))):
        if 2 * part <= last and further % part == 0:
            found.append(part)
            last = part
    return found


def _more_prompts(config: TrainConfig) -> list[TrainConfig]:
    """Returns the config with twice the prompts, and so on; none if its rollout is sampled in parts."""
    tokens = max(config.prompt_buckets) + config.sampler.completion_length
    most = ENOUGH_TOKENS * config.mesh.data * config.mesh.fsdp / (tokens * config.group_size)
    found, prompts = [], 2 * config.prompts_per_iteration
    while config.rollout_rows is None and prompts <= most:
        found.append(dataclasses.replace(config, prompts_per_iteration=prompts))
        prompts *= 2
    return found
