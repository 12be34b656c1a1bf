"""Derives the sampler of evaluations from that of rollouts."""

from __future__ import annotations

import dataclasses

from gdsd_jax.config.schema import TrainConfig
from gdsd_jax.diffusion import SamplerConfig
from gdsd_jax.runtime.ranges import Count


def greedy_sampler(config: TrainConfig, length: int | None = None, steps: Count | None = None) -> SamplerConfig:
    """Returns the run's sampler as evaluations use it: at temperature 0, without threshold, factor and cache.

    A sampler with a single block keeps a single block at every length.

    Args:
      length: completion length; None: the rollout's.
      steps: denoising steps; None: those of `config.evaluation`, in proportion to the length.
    """
    sampler = config.sampler
    length = length or sampler.completion_length
    if steps is None:
        wanted = config.evaluation.steps
        steps = length // 2 if wanted is None else wanted * length // sampler.completion_length
    whole = sampler.block_length == sampler.completion_length
    return dataclasses.replace(
        sampler,
        temperature=0.0,
        threshold=None,
        factor=None,
        cache="none",
        refresh_every=None,
        completion_length=length,
        block_length=length if whole else sampler.block_length,
        steps=max(1, steps),
    )
