"""Writes parameters into safetensors files, one tensor at a time.

The devices pick a layer and merge the adapter into it; the host receives what is written to the file.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from gdsd_jax.denoiser import DenoiserConfig, LoRA
from gdsd_jax.denoiser.lora import target_shapes
from gdsd_jax.hub import names
from gdsd_jax.hub.files import FLOATS
from gdsd_jax.hub.finite import require_finite
from gdsd_jax.runtime.errors import UserError

_PIECE_BYTES = 2 << 20  # about what is checked and written at a time
_CODES = {dtype: code for code, dtype in FLOATS.items()}


class Outgoing(NamedTuple):
    """A tensor to be written: its dtype and shape for the header, and a function that returns its data."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fetch: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape))


def _host(array: Any) -> np.ndarray:
    """Returns an array in host memory. If the array spans several processes, all of them must make this call."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def layer_of(array: Any, layer: int | None) -> Any:
    """Returns one layer of a stacked parameter, on the devices or the host, wherever the parameter is.

    The layer of an array that lies whole on one CPU is a view of its memory.
    """
    if isinstance(array, jax.Array) and len(array.devices()) == 1 and _on_cpu(array):
        array = np.asarray(array)
    if layer is None:
        return array
    return _pick(array, np.int32(layer)) if isinstance(array, jax.Array) else np.asarray(array)[layer]


@jax.jit
def _pick(stack: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False)


@functools.partial(jax.jit, static_argnames="dtype")
def _merged(w: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, *, dtype: np.dtype) -> jax.Array:
    """Computes `W + scale * (A B)^T` in float32 and rounds it once, to `dtype`."""
    a, b = (factor.astype(jnp.float32) for factor in (a, b))
    delta = jnp.einsum("ir,ro->oi", a, b, precision=jax.lax.Precision.HIGHEST)
    return (w.astype(jnp.float32) + scale * delta).astype(dtype)


def turned(array: Any) -> np.ndarray:
    """Returns the transpose of a matrix in host memory; devices transpose what they hold."""
    if isinstance(array, jax.Array):
        return _host(jnp.swapaxes(array, 0, 1))
    return np.ascontiguousarray(array.T)


def _on_cpu(array: jax.Array) -> bool:
    return next(iter(array.devices())).platform == "cpu"


def _pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yields an array in flat pieces, in the order of its entries; each stays in the processor's cache."""
    flat, step = array.reshape(-1), _PIECE_BYTES // array.itemsize
    yield from (flat[at : at + step] for at in range(0, flat.size, step))


def checkpoint_tensors(
    config: DenoiserConfig, base: Mapping, lora: LoRA | None, dtype: np.dtype | None
) -> dict[str, Outgoing]:
    """Returns every tensor of the checkpoint by its stored name, with the adapter merged in if there is one."""
    tensors = {}
    slots = names.slots(config)
    if lora is not None:
        check_adapter(config, lora)
    paths = {tuple(key.key for key in keys) for keys, _ in jax.tree_util.tree_leaves_with_path(base)}
    for kind, odd in (("lack", set(names.parameters(config)) - paths), ("hold", paths - set(names.parameters(config)))):
        if odd:
            raise UserError(f"the parameters {kind} {'/'.join(min(odd))}, unlike their configuration")
    for name in sorted(slots):
        slot = slots[name]
        array = names.at(base, slot.path)
        wanted = slot.shape if slot.layer is None else (config.num_layers, *slot.shape)
        if tuple(array.shape) != wanted:
            raise UserError(f"parameter {'/'.join(slot.path)} has shape {tuple(array.shape)}, not {wanted}")
        held = np.dtype(array.dtype)
        target = dtype or held
        if target not in _CODES:
            raise UserError(f"parameter {'/'.join(slot.path)} cannot be stored as {target}: give dtype='bfloat16'")
        factors = lora.weights["layers"].get(slot.path[1]) if lora is not None and slot.is_matrix else None

        def fetch(array=array, slot=slot, factors=factors, target=target) -> np.ndarray:
            tensor = layer_of(array, slot.layer)
            if factors is not None:
                a, b = (layer_of(factors[name], slot.layer) for name in "ab")
                tensor = _merged(tensor, a, b, np.float32(lora.alpha / lora.rank), dtype=target)
            elif tensor.dtype != target:
                tensor = tensor.astype(target)
            return _host(tensor)

        tensors[name] = Outgoing(target, slot.shape, fetch)
    return tensors


def check_adapter(config: DenoiserConfig, lora: LoRA) -> None:
    """Raises UserError unless every factor of the adapter has the shape that this model and its rank imply."""
    for target in lora.targets:
        fan_in, fan_out = target_shapes(config)[target]
        for factor, shape in (("a", (fan_in, lora.rank)), ("b", (lora.rank, fan_out))):
            found = tuple(lora.weights["layers"][target][factor].shape)
            if found != (config.num_layers, *shape):
                raise UserError(f"adapter weight {target}/{factor} has shape {found}: it is of another model")


def write_safetensors(path: Path, tensors: Mapping[str, Outgoing], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors into a safetensors file one after another; `metadata` adds texts to its header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for name, tensor in tensors.items():
        span = [position, position + tensor.size]
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        position += tensor.size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        # Each tensor is fetched while the previous one is written.
        with ThreadPoolExecutor(1) as pool:
            ahead = None
            for name in [*tensors, None]:
                before, ahead = ahead, name and (name, pool.submit(tensors[name].fetch))
                if before:
                    data = before[1].result()
                    for piece in _pieces(data):
                        require_finite(piece, before[0], "what is exported")
                        file.write(piece.view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def shards_of(tensors: Mapping[str, Outgoing], max_bytes: int) -> dict[str, dict[str, Outgoing]]:
    """Groups tensors by file name, in order; no file exceeds `max_bytes` unless one tensor alone is larger."""
    groups: list[dict[str, Outgoing]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if groups[-1] and filled + tensor.size > max_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = tensor
        filled += tensor.size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}
