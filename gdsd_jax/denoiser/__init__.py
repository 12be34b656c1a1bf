"""The masked denoiser: pure functions over plain pytrees, for every model family."""

from gdsd_jax.denoiser.config import DenoiserConfig
from gdsd_jax.denoiser.lora import TARGETS, LoRA, init_lora
from gdsd_jax.denoiser.model import (
    denoise,
    head_weights,
    hidden_states,
    init_base,
    logical_axes,
    logits_from_hidden,
)

__all__ = [
    "TARGETS",
    "DenoiserConfig",
    "LoRA",
    "denoise",
    "head_weights",
    "hidden_states",
    "init_base",
    "init_lora",
    "logical_axes",
    "logits_from_hidden",
]
