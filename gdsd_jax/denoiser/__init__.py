"""The masked denoiser: pure functions over plain pytrees, for every model family."""

from gdsd_jax.denoiser.blocks import noisy_states_at
from gdsd_jax.denoiser.config import DenoiserConfig
from gdsd_jax.denoiser.forward import (
    Read,
    denoise,
    hidden_states,
    hidden_states_at,
    logits_from_hidden,
    refresh_cache,
    window_pass,
    window_states_at,
)
from gdsd_jax.denoiser.lora import TARGETS, LoRA, init_lora
from gdsd_jax.denoiser.model import head_weights, init_base, logical_axes, pick, precision_of
from gdsd_jax.denoiser.prepared import repeated

__all__ = [
    "TARGETS",
    "DenoiserConfig",
    "LoRA",
    "Read",
    "denoise",
    "head_weights",
    "hidden_states",
    "hidden_states_at",
    "init_base",
    "init_lora",
    "logical_axes",
    "logits_from_hidden",
    "noisy_states_at",
    "pick",
    "precision_of",
    "refresh_cache",
    "repeated",
    "window_pass",
    "window_states_at",
]
