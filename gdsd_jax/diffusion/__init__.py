"""Diffusion over text: the forward process, the iterative-unmasking sampler and the scorer."""

from gdsd_jax.diffusion.remasking import SamplerConfig
from gdsd_jax.diffusion.sampler import Rollout, sample

__all__ = ["Rollout", "SamplerConfig", "sample"]
