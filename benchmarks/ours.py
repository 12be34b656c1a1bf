"""Builds our side of the benches."""

from benchmarks.workloads import Workload
from gdsd_jax.denoiser import DenoiserConfig


def denoiser(shape: Workload) -> DenoiserConfig:
    """Returns the denoiser of a workload, with its few layers unrolled."""
    return DenoiserConfig(
        family="llada", vocab_size=shape.vocabulary, hidden_size=shape.width, num_layers=shape.layers,
        num_heads=shape.heads, num_kv_heads=shape.heads, intermediate_size=shape.feed_forward, max_length=4096,
        rope_theta=500000.0, rms_norm_eps=1e-5, qkv_bias=False, tied_head=False, next_token_logits=False,
        mask_token_id=shape.mask_id, eos_token_id=0, pad_token_id=0, layer_unroll=shape.layers,
    )  # fmt: skip
