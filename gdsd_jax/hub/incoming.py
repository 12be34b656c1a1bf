"""Moves stored tensors from files to devices: reads them in blocks, every byte once, and stacks the layers there.

An accelerator receives a tensor as it is stored and puts it into its stack. Where the devices are this machine's CPUs,
blocks go from the file straight into the memory that the devices then use, or through a small buffer if the dtype
changes or several devices share a block.
"""

from __future__ import annotations

import functools
import math
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from gdsd_jax.hub import names
from gdsd_jax.hub.files import FLOATS, Reader, Stored, in_bucket
from gdsd_jax.hub.finite import require_finite
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.sharding import named_sharding

# Several blocks are read at once, because buckets answer slowly and disks are faster with several requests. A block of
# a local file stays in the processor's cache until it is where it belongs.
THREADS, BLOCK_BYTES, LOCAL_BLOCK_BYTES = min(8, os.cpu_count() or 1), 16 << 20, 2 << 20
_scratch = threading.local()


class Box(NamedTuple):
    """A block of a stored matrix: the first row and the row past the last one, and likewise for the columns."""

    rows: tuple[int, int]
    columns: tuple[int, int]


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    """Returns which block of a stored tensor of this shape `index` selects."""
    spans = [piece.indices(size)[:2] for piece, size in zip(index, shape, strict=True)]
    return Box(*spans, *[(0, 1)] * (2 - len(spans)))


def _blocks(boxes: Iterable[Box], stored: Stored) -> Iterator[Box]:
    """Yields disjoint blocks of bounded size that together cover the boxes and nothing else.

    For a file in a bucket the blocks cover whole rows, because one request per row would cost more than reading columns
    that are not needed.
    """
    width, itemsize = stored.matrix[1], FLOATS[stored.dtype].itemsize
    size = BLOCK_BYTES if in_bucket(stored.file) else LOCAL_BLOCK_BYTES
    limit = max(1, size // (width * itemsize))
    edges = sorted({edge for box in boxes for edge in box.rows})
    for first, last in zip(edges, edges[1:], strict=False):
        spans = sorted(box.columns for box in boxes if box.rows[0] <= first and last <= box.rows[1])
        if spans and in_bucket(stored.file):
            spans = [(0, width)]
        merged: list[tuple[int, int]] = []
        for begin, end in spans:
            if merged and begin <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((begin, end))
        for row in range(first, last, limit):
            for columns in merged:
                yield Box((row, min(row + limit, last)), columns)


def fill_boxes(stored: Stored, pieces: Mapping[Box, np.ndarray], reader: Reader, pool: Executor) -> None:
    """Reads boxes of a stored matrix into arrays of their shapes; bytes that several boxes share are read once."""

    def read(block: Box) -> None:
        targets = []
        for box, piece in pieces.items():
            spans = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(block, box, strict=True)]
            if all(begin < end for begin, end in spans):
                targets.append((Box(*spans), piece[_within(spans, box)]))
        # The block is read straight into a target that takes all of it in the stored dtype, if there is one.
        dtype = FLOATS[stored.dtype]
        straight = next((part for spans, part in targets if spans == block and part.dtype == dtype), None)
        out = _buffer([end - begin for begin, end in block], dtype) if straight is None else straight
        data = reader.block(stored, *block, out=out)
        require_finite(data, stored.name, stored.file)
        for spans, part in targets:
            if part is not straight:
                _copy(data[_within(spans, block)], part)

    for _ in pool.map(read, _blocks(pieces, stored)):
        pass


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    """Copies a matrix to a target of the same shape, in the target's dtype."""
    if source.dtype == target.dtype:
        # NumPy copies integers faster than bfloat16, which it has from an extension.
        source, target = (array.view(f"u{array.itemsize}") for array in (source, target))
    target[:] = source


def _buffer(shape: Iterable[int], dtype: np.dtype) -> np.ndarray:
    """Returns an array in memory that this thread uses again for each block: fresh pages cost more than a copy."""
    rows, columns = shape
    size = rows * columns * dtype.itemsize
    if getattr(_scratch, "memory", np.empty(0)).size < size:
        _scratch.memory = np.empty(size, np.uint8)
    return _scratch.memory[:size].view(dtype).reshape(rows, columns)


def _fresh(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an array of zeros at the start of a page, which a CPU device can use where it is, without a copy.

    Its pages are fetched at once, which takes two thirds of the time of one page after the other.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)
    memory = mmap.mmap(-1, max(1, math.prod(shape) * dtype.itemsize), flags=flags)
    return np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)


def _within(spans: Iterable[tuple[int, int]], box: Box) -> tuple[slice, slice]:
    """Returns spans of rows and columns as an index into a box that contains them."""
    return tuple(slice(begin - low, end - low) for (begin, end), (low, _) in zip(spans, box, strict=True))


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stack: jax.Array, layer: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer, index, 0)


class Loader(NamedTuple):
    """Reads parameters, each given by its stored tensors in the order of the layers and by the slot of one of them."""

    dtype: np.dtype | None
    reader: Reader
    pool: Executor

    def whole(self, layers: list[Stored], slot: names.Slot) -> jax.Array:
        """Reads a parameter and puts it on the default device."""
        (rows, columns), dtype = layers[0].matrix, self._dtype(layers, slot)
        if _on_cpus(jax.devices()[0]):
            return self._in_place(layers, slot, SingleDeviceSharding(jax.devices()[0]), dtype)
        stack = np.empty((len(layers), rows, columns), dtype)
        for stored, piece in zip(layers, stack, strict=True):
            fill_boxes(stored, {Box((0, rows), (0, columns)): piece}, self.reader, self.pool)
        return jax.device_put(stack.reshape(*([] if slot.layer is None else [len(layers)]), *slot.shape))

    def spread(self, layers: list[Stored], slot: names.Slot, axes: tuple[str, ...], mesh: Mesh) -> jax.Array:
        """Reads a parameter and shards it over a mesh by its logical axes."""
        dtype, shape = self._dtype(layers, slot), slot.shape
        place = named_sharding(mesh, axes[-len(shape) :], shape)
        if _on_cpus(mesh.devices.flat[0]):
            spec = place.spec if slot.layer is None else P(None, *place.spec)
            return self._in_place(layers, slot, NamedSharding(mesh, spec), dtype)
        held = place.addressable_devices_indices_map(shape).values()

        def send(stored: Stored) -> jax.Array:
            return jax.make_array_from_callback(shape, place, self._pieces(stored, dtype, held, shape))

        if slot.layer is None:
            return send(layers[0])
        stack, before = jnp.zeros((len(layers), *shape), dtype, device=NamedSharding(mesh, P(None, *place.spec))), None
        for layer, stored in enumerate(layers):
            array = send(stored)
            stack = _set_layer(stack, array, np.int32(layer))
            if before is not None:
                # At most one earlier layer is still on its way to the devices while this one is read.
                before.block_until_ready()
            before = array
        return stack.block_until_ready()

    def _in_place(self, layers: list[Stored], slot: names.Slot, place: Sharding, dtype: np.dtype) -> jax.Array:
        """Reads a parameter into memory of this host, and hands that memory to the CPU devices."""
        shape = slot.shape if slot.layer is None else (len(layers), *slot.shape)
        spans = {
            device: tuple(piece.indices(size)[:2] for piece, size in zip(index, shape, strict=True))
            for device, index in place.addressable_devices_indices_map(shape).items()
        }
        parts = {span: _fresh(tuple(end - begin for begin, end in span), dtype) for span in spans.values()}
        for number, stored in enumerate(layers):
            pieces = {}
            for span, part in parts.items():
                inner, target = (span, part) if slot.layer is None else (span[1:], part[number])
                box = Box(*inner, *[(0, 1)] * (2 - len(inner)))
                pieces[box] = target.reshape(len(target), -1)
            fill_boxes(stored, pieces, self.reader, self.pool)
        arrays = [jax.device_put(parts[span], device, may_alias=True) for device, span in spans.items()]
        return jax.make_array_from_single_device_arrays(shape, place, arrays)

    def _dtype(self, layers: list[Stored], slot: names.Slot) -> np.dtype:
        kinds = {stored.dtype for stored in layers}
        if self.dtype is None and len(kinds) > 1:
            raise UserError(f"{layers[0].file} stores the layers of {'/'.join(slot.path)} as {kinds}: give one dtype")
        # JAX has float64 only where it is enabled for the whole process.
        return self.dtype or jax.dtypes.canonicalize_dtype(FLOATS[layers[0].dtype])

    def _pieces(
        self,
        stored: Stored,
        dtype: np.dtype,
        held: Iterable[tuple[slice, ...]],
        shape: tuple[int, ...],
    ) -> Callable:
        """Reads the parts `held` of a tensor of this shape; returns a function from a part's index to the part."""
        boxes = {_box(index, shape) for index in held}
        pieces = {box: np.empty([end - begin for begin, end in box], dtype) for box in boxes}
        fill_boxes(stored, pieces, self.reader, self.pool)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            piece = pieces[_box(index, shape)]
            return piece[:, 0] if len(shape) == 1 else piece

        return part


def _on_cpus(device: jax.Device) -> bool:
    return device.platform == "cpu"
