"""Chooses the attention of a program, and calls cuDNN's fused attention for NVIDIA GPUs.

    plain    `ops.attention`, on every platform and in every dtype
    splash   the kernel for TPUs, see `splash`
    cudnn    flash attention of cuDNN, for whole sequences and for windows under a cache

B rows, T tokens, S queries, W tokens of a window, H heads, K head size.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gdsd_jax.denoiser.config import DenoiserConfig
from gdsd_jax.denoiser.splash import LANES, on_each_device

# An argument of `jax.nn.dot_product_attention`, which tests on a CPU set to "xla".
IMPLEMENTATION = "cudnn"
# cuDNN requires a GPU of this compute capability or a higher one, and head sizes that are multiples of 8 up to 128.
_CAPABILITY, _LARGEST_HEAD = 8, 128


def chosen(config: DenoiserConfig) -> str:
    """Returns the name of the attention that a denoiser uses; "auto" chooses by the devices that will run the program.

    These are the devices of the current mesh, which this machine need not have; without a mesh, those of the default
    backend. Under "auto", float32 takes the plain path, whose products are exact, and so do head sizes that no kernel
    supports.
    """
    if config.attention != "auto":
        return config.attention
    if config.dtype != "bfloat16":
        return "plain"
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    if platform == "tpu" and config.head_dim % LANES == 0:
        return "splash"
    if platform in ("gpu", "cuda") and config.head_dim % 8 == 0 and config.head_dim <= _LARGEST_HEAD and _flash():
        return "cudnn"
    return "plain"


def _flash() -> bool:
    """Returns whether cuDNN has flash attention for the GPUs of this machine."""
    # GPUs of AMD have names such as gfx90a in place of a version.
    major, _, minor = str(getattr(jax.local_devices()[0], "compute_capability", "")).partition(".")
    return major.isdigit() and minor.isdigit() and int(major) >= _CAPABILITY


def cudnn(
    query: Float[Array, "B S H K"],
    key: Float[Array, "B T kv K"],
    value: Float[Array, "B T kv K"],
    real: Bool[Array, "#B T"] | None,
    allowed: Bool[Array, "#B S T"] | None = None,
) -> Float[Array, "B S H K"]:
    """Computes the same attention as `ops.attention` with cuDNN; the softmax is float32."""
    masks = [mask for mask in (None if real is None else real[:, None], allowed) if mask is not None]
    if not masks:
        return on_each_device(_kernel, [query, key, value], [])
    (rows, length), total = query.shape[:2], key.shape[1]
    seen = functools.reduce(jnp.logical_and, masks)
    # With a mask, the kernel's gradient requires even lengths.
    query, key, value = (appended(x, 1, x.shape[1] % 2) for x in (query, key, value))
    seen = appended(appended(jnp.broadcast_to(seen, (rows, length, total)), 1, length % 2), 2, total % 2)
    return on_each_device(_kernel, [query, key, value], [seen])[:, :length]


def written(
    cached: tuple[Float[Array, "B T kv K"], Float[Array, "B T kv K"]],
    window: tuple[Float[Array, "B W kv K"], Float[Array, "B W kv K"]],
    start: Int[Array, ""],
    own: Bool[Array, "#B W"] | None,
) -> tuple[Float[Array, "B T kv K"], ...]:
    """Returns the cached keys and values, with those of a window written into the columns from `start` on.

    Only columns where `own` is True are written (None: all of the window's). A loop that carries the arrays writes them
    in place.
    """

    def put(old: Array, new: Array) -> Array:
        if own is not None:
            here = jax.lax.dynamic_slice_in_dim(old, start, new.shape[1], axis=1)
            new = jnp.where(own[..., None, None], new, here)
        return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1)

    return tuple(map(put, cached, window))


def appended(x: Array, axis: int, count: int) -> Array:
    """Returns an array with `count` zeros appended along an axis."""
    return jnp.pad(x, [(0, count if n == axis % x.ndim else 0) for n in range(x.ndim)])


def _kernel(query: Array, key: Array, value: Array, seen: Array | None = None) -> Array:
    """Runs the kernel on the rows and heads of one device; the mask `seen` is `[B, S, T]`."""
    mask = None if seen is None else seen[:, None]
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=IMPLEMENTATION)
