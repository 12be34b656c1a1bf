"""Reinforcement learning for masked diffusion language models in JAX: rollouts, rewards, scores and updates on one code path
from a single CPU to TPU pods. Start reading in `gdsd_jax.train`."""

__version__ = "0.1.0"
