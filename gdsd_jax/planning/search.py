"""Searches for a mesh on a slice, what to recompute, and the micro-batch and rollout that fit, as the compiler decides.

Meshes are tried in ascending order of the bytes that a chip sends, by estimate. On each mesh, the backward pass that
keeps the outputs of products is tried first. A rollout that does not fit is cut into parts, and one that fits grows.
Sizes are doubled as long as temporaries in proportion to them would still fit, and halved again if the compiler
refuses the result.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from gdsd_jax import hub
from gdsd_jax.config import TrainConfig
from gdsd_jax.runtime.sharding import MeshConfig

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
        and rows % (chips // tensor) == 0
        and all(size % tensor == 0 for size in (model.num_heads, model.intermediate_size))
        and model.hidden_size % (chips // (data * tensor)) == 0
    ]
    return sorted(found, key=sent)


def search(
    config: TrainConfig, chips: int, measure: Measure, tried: Report, *, compilations: int
) -> TrainConfig | None:
    """Returns the config with the suggested mesh, remat, micro-batch, rollout parts and prompts; None if nothing fits.

    Args:
      measure: compiles the named program of a config and returns its report.
      tried: is called with the config, the program's name and the report after each compilation.
      compilations: the most compilations to make.
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

    def grow(config: TrainConfig, name: str, report: dict[str, Any], larger: Callable) -> TrainConfig:
        """Returns `larger(config, factor)` for the largest power of two with which program `name` fits."""
        room = report["hbm_bytes"] - report["peak_bytes"] + report["temporary_bytes"]
        factor = 1
        while report["temporary_bytes"] * factor * 2 <= room and larger(config, factor * 2):
            factor *= 2
        while factor > 1 and not compiled(larger(config, factor), name)["fits"]:
            factor //= 2
        return larger(config, factor)

    best = None
    try:
        for mesh, remat in itertools.product(meshes(config, chips), REMATS):
            rows = max(mesh.data * mesh.fsdp, config.group_size)
            start = dataclasses.replace(config, mesh=mesh, microbatch_rows=rows)
            start = dataclasses.replace(start, model=dataclasses.replace(config.model, remat=remat))
            update = compiled(start, "update")
            if update["fits"]:
                best = start
                break
        if best is None:
            return None
        best = grow(best, "update", update, _more_rows_at_once)
        sampler = compiled(best, "sampler")
        if sampler["fits"]:
            return grow(best, "sampler", sampler, _more_prompts)
        for smaller in _parts(best):
            if compiled(smaller, "sampler")["fits"]:
                return smaller
    except OutOfCompilations:
        pass
    return best


def _parts(config: TrainConfig) -> Iterator[TrainConfig]:
    """Yields the config with rollouts in more and more parts, each of whole groups that spread over the mesh."""
    rows, shards = config.prompts_per_iteration * config.group_size, config.mesh.data * config.mesh.fsdp
    part = config.rollout_rows or rows
    while part % 2 == 0 and part // 2 % math.lcm(config.group_size, shards) == 0:
        part //= 2
        yield dataclasses.replace(config, rollout_rows=part)


def _more_rows_at_once(config: TrainConfig, factor: int) -> TrainConfig | None:
    rows, some = config.prompts_per_iteration * config.group_size, config.microbatch_rows * factor
    return dataclasses.replace(config, microbatch_rows=some) if rows % some == 0 else None


def _more_prompts(config: TrainConfig, factor: int) -> TrainConfig:
    return dataclasses.replace(config, prompts_per_iteration=config.prompts_per_iteration * factor)
