"""Copies matrices between memory by rows and memory by columns, in tiles that stay in the processor's cache."""

from __future__ import annotations

import numpy as np

# Bytes of a column and of a row of a tile: the column is a run of the target's memory, the row one of the source's.
COLUMN_BYTES, ROW_BYTES = 1024, 512
# Rows of a tile are this much further apart in its buffer: at a power of two, they would displace each other from the
# cache.
_GAP_BYTES = 64


def copy(source: np.ndarray, target: np.ndarray) -> None:
    """Copies a matrix to a target of the same shape, in the target's dtype.

    If the rows of one are the columns of the other, NumPy alone takes twice the time.
    """
    if source.dtype == target.dtype:
        # NumPy copies integers faster than bfloat16, which it has from an extension.
        source, target = (array.view(f"u{array.itemsize}") for array in (source, target))
    if target.strides[0] >= target.strides[1]:
        source, target = source.T, target.T
    if source.strides[0] <= source.strides[1]:
        target[:] = source
        return
    height, width, gap = (size // target.itemsize for size in (COLUMN_BYTES, ROW_BYTES, _GAP_BYTES))
    buffer = np.empty((height, width + gap), target.dtype)
    for row in range(0, source.shape[0], height):
        for column in range(0, source.shape[1], width):
            place = np.s_[row : row + height, column : column + width]
            tile = source[place]
            staged = buffer[: tile.shape[0], : tile.shape[1]]
            staged[:] = tile
            target[place] = staged
