"""Splash attention, the flash-attention kernel for TPUs that ships with JAX, set up for this denoiser.

Scores never reach HBM, neither in the forward nor in the backward pass. Pads form a segment of their own.

B rows, T tokens, H query heads, kv key/value heads, K head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from jaxtyping import Array, Bool, Float, Int

from gdsd_jax.denoiser.layout import Layout
from gdsd_jax.runtime import sharding

# The vector width of a TPU core.
LANES = 128
# The largest tile of queries and keys. Its float32 scores take 1 MiB, and the kernels keep a handful of tiles in VMEM.
LARGEST_BLOCK = 512


def padded_length(length: int) -> int:
    """Returns the number of tokens that the kernel works on: `length` rounded up to a multiple of `LANES`."""
    return -(-length // LANES) * LANES


def attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B T kv K"],
    value: Float[Array, "B T kv K"],
    real: Bool[Array, "B T"] | Int[Array, "B T"] | None,
    *,
    layout: Layout | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H K"]:
    """Computes the same attention as `ops.attention` on a TPU: softmax in float32, products in the dtype of the arrays.

    Pads attend only to pads, and real tokens only to real tokens; the outputs at pads are never read. Where a mesh is
    set, each device runs the kernel on its own rows and heads.

    Args:
      real: True on real tokens; in packed rows the number of each token's text, which attends only to itself.
      layout: which columns attend to which. The kernel computes this mask from indices and skips tiles that it empties.
      interpret: runs the kernel's arithmetic in JAX, on any platform.
    """
    length, head_dim = query.shape[1], query.shape[3]
    beyond = padded_length(length) - length
    segments = jnp.ones(query.shape[:2], jnp.int32) if real is None else real.astype(jnp.int32)
    arrays = [(query.astype(jnp.float32) * head_dim**-0.5).astype(query.dtype), key, value]
    run = functools.partial(_local_attention, layout=layout, interpret=interpret)

    def padded(*arrays: Array) -> list[Array]:
        return [jnp.pad(x, ((0, 0), (0, beyond)) + ((0, 0),) * (x.ndim - 2)) for x in arrays]

    return on_each_device(run, padded(*arrays), padded(segments))[:, :length]


def on_each_device(
    run: Callable[..., Array], arrays: Sequence[Float[Array, "B _ _ K"]], masks: Sequence[Array]
) -> Float[Array, "B S H K"]:
    """Calls `run(query, key, value, *masks)`; where a mesh is set, each device calls it on its own rows and heads.

    Args:
      arrays: queries `[B, S, H, K]`, keys and values `[B, T, kv, K]`.
      masks: arrays whose first axis is the rows.
    """
    mesh = sharding.current()
    if not mesh.empty and mesh.size > 1:
        query, key, _ = arrays
        fit = functools.partial(sharding.fitted_spec, mesh)
        if fit(("heads",), key.shape[2:3]) != fit(("heads",), query.shape[2:3]):
            # The mesh cuts query heads into more parts than key/value heads, so every query head gets its own copy.
            arrays = [query, *(jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in arrays[1:])]
        specs = [fit(("rows", "tokens", "heads", "head_dim"), x.shape) for x in arrays]
        specs += [fit(("rows", *["tokens"] * (x.ndim - 1)), x.shape) for x in masks]
        run = jax.shard_map(run, in_specs=tuple(specs), out_specs=specs[0], check_vma=False)
    return run(*arrays, *masks)


class _LayoutMask(splash_attention_mask._ComputableMask):
    """A layout in the form of a mask that the kernel computes from the indices of queries and keys."""

    def __init__(self, layout: Layout, length: int):
        super().__init__(shape=(length, length), mask_function=layout.attends)
        self._identity = (layout, length)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _LayoutMask) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)


def _mask(layout: Layout | None, length: int) -> splash_attention_mask.Mask:
    return splash_attention.FullMask((length, length)) if layout is None else _LayoutMask(layout, length)


def _local_attention(
    query: Array, key: Array, value: Array, segments: Array, *, layout: Layout | None, interpret: bool
) -> Array:
    """Runs the kernel on the rows and heads of one device; T is a multiple of `LANES`."""
    length, heads = query.shape[1:3]
    block = max(size for size in range(LANES, LARGEST_BLOCK + 1, LANES) if length % size == 0)
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([_mask(layout, length)] * heads),
        block_sizes=splash_attention.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            # One kernel computes all three gradients with five products instead of seven.
            use_fused_bwd_kernel=True,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def one_row(query: Array, key: Array, value: Array, segments: Array) -> Array:
        query, key, value = (x.swapaxes(0, 1) for x in (query, key, value))
        return kernel(query, key, value, splash_attention.SegmentIds(segments, segments)).swapaxes(0, 1)

    return jax.vmap(one_row)(query, key, value, segments)
