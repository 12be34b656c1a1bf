"""Diffusion over text: the forward process, the iterative-unmasking sampler, its likelihood and the scorer."""

from gdsd_jax.diffusion.remasking import SamplerConfig
from gdsd_jax.diffusion.sampler import Rollout, sample
from gdsd_jax.diffusion.trajectory import trajectory_log_prob

__all__ = ["Rollout", "SamplerConfig", "sample", "trajectory_log_prob"]
