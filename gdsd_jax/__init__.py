"""Reinforcement learning for masked diffusion language models in JAX, on one code path from a CPU to TPU pods.

Start reading in `gdsd_jax.train`.
"""

__version__ = "0.1.0"
