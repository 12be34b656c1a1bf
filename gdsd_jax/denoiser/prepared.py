"""Prepares parameters for a loop of many passes, such as a rollout, by computing once what the passes share.

V vocabulary, I inputs and O outputs of a matrix, r rank of an adapter.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gdsd_jax.denoiser import attention, ops
from gdsd_jax.denoiser.config import DenoiserConfig
from gdsd_jax.denoiser.lora import LoRA
from gdsd_jax.denoiser.model import embed, linear_of
from gdsd_jax.runtime.sharding import alone, pieces

# Layers are unstacked on a GPU only if this copy of them takes at most this share of its memory.
SHARE = 0.25


def unstacked(config: DenoiserConfig, base: Any, lora: LoRA | None) -> tuple[Any, LoRA | None]:
    """Returns the parameters with a tuple of layers instead of stacked arrays, if all layers are unrolled.

    Every pass of `forward` calls this. A loop of many passes calls `repeated` once instead, before it begins.
    """
    return (base, lora) if config.layer_unroll < config.num_layers else _split(config, base, lora)


def _split(config: DenoiserConfig, base: Any, lora: LoRA | None) -> tuple[Any, LoRA | None]:
    """Unstacks the layers, unless they are unstacked already."""

    def layer(tree: Any, n: int) -> Any:
        return jax.tree.map(lambda stacked: stacked[n], tree)

    def split(tree: Any) -> Any:
        if isinstance(tree["layers"], tuple):
            return tree
        return tree | {"layers": tuple(layer(tree["layers"], n) for n in range(config.num_layers))}

    return split(base), None if lora is None else lora.replace(weights=split(lora.weights))


def repeated(
    config: DenoiserConfig, base: Any, lora: LoRA | None, tokens: int, cached: bool = False
) -> tuple[Any, LoRA | None]:
    """Prepares parameters for repeated passes: unstacks layers, and precomputes what depends on parameters alone.

    Where all layers are unrolled and the vocabulary is smaller than `tokens`, the result also has the first layer's
    queries, keys and values of every entry of the vocabulary. Where layers are not unrolled, the parameters are
    unchanged.

    Args:
      tokens: the number of tokens that all passes compute together.
      cached: whether most passes are over short windows under a cache. On an NVIDIA GPU the layers are then unstacked
        if memory has room for a copy of them (`SHARE`), because a loop over stacked arrays copies each layer's matrices
        in every pass.
    """
    if cached and attention.chosen(config) == "cudnn" and _room(config, base):
        base, lora = _split(config, base, lora)
        return base, lora if config.weights == "int8" or not alone() else _joined(config, base, lora)
    base, lora = unstacked(config, base, lora)
    if config.layer_unroll >= config.num_layers > 1 and config.vocab_size < tokens:
        base = base | {"first_projections": _first_projections(config, base, lora)}
    return base, lora


def _first_projections(config: DenoiserConfig, base: Any, lora: LoRA | None) -> dict[str, Float[Array, "V O"]]:
    """Computes the first layer's queries, keys and values of every vocabulary entry, before they are rotated."""
    own = {"params": base["layers"][0]} | ({} if lora is None else {"lora": lora.weights["layers"][0]})
    x = embed(config, base["embedding"], jnp.arange(config.vocab_size)[None])
    h = ops.rms_norm(x, own["params"]["attn_norm"], config.rms_norm_eps)
    adapter = None if lora is None else lora.replace(weights=None)

    def projected(name: str) -> Array:
        variables = {kind: tree.get(name, {}) for kind, tree in own.items()}
        return linear_of(config, name, adapter).apply(variables, h, False)[0]

    return {name: projected(name) for name in "qkv"}


def _room(config: DenoiserConfig, base: Any) -> bool:
    """Returns whether each device has room for a copy of its part of the layers."""
    cut = pieces("embed", config.hidden_size) * pieces("mlp", config.intermediate_size)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(base["layers"])) / cut <= SHARE * _memory()


def _memory() -> float:
    """Returns the bytes of memory of a device; infinity if it does not report them."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)


def _joined(config: DenoiserConfig, base: Any, lora: LoRA | None) -> LoRA | None:
    """Returns the adapter with each matrix W beside the adapter's scaled B, as one matrix `joined` `[O, I + r]`.

    `x W^T + (x A) B` is then one product, whose float32 sum is rounded once and never stored.
    """
    if lora is None:
        return None

    def join(weight: Array, factors: dict[str, Array]) -> dict[str, Array]:
        b = lora.alpha / lora.rank * factors["b"]
        parts = [part.astype(config.dtype) for part in (weight, b.T)]
        return {"a": factors["a"].astype(config.dtype), "joined": jnp.concatenate(parts, axis=1)}

    layers = tuple(
        {name: join(own[name]["weight"], factors) for name, factors in adapter.items()}
        for own, adapter in zip(base["layers"], lora.weights["layers"], strict=True)
    )
    return lora.replace(weights=lora.weights | {"layers": layers})
