"""Refuses weights that hold NaN or an infinity."""

from __future__ import annotations

import numpy as np

from gdsd_jax.hub.files import FLOATS
from gdsd_jax.runtime.errors import UserError

_PIECE = 1 << 18  # entries
# The bits of infinity in each float format. Of the patterns without a sign, only those of NaN are larger integers.
_INFINITIES = {"F64": 0x7FF0000000000000, "F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}


def require_finite(data: np.ndarray, name: str, where: object) -> None:
    """Raises UserError if a float array holds NaN or an infinity."""
    code = next(code for code, dtype in FLOATS.items() if dtype == data.dtype)
    infinity, size = _INFINITIES[code], data.itemsize
    minus_infinity = infinity + (1 << 8 * size - 1)
    flat = data.reshape(-1) if data.flags.c_contiguous else None
    # Piece by piece, so that the second maximum finds the entries in the processor's cache.
    pieces = [data] if flat is None else (flat[at : at + _PIECE] for at in range(0, flat.size, _PIECE))
    for piece in pieces:
        # As signed integers, negative entries are the smallest; as unsigned ones, they are the largest.
        signed, unsigned = (piece.view(f"{kind}{size}").max(initial=0) for kind in "iu")
        if signed >= infinity or unsigned >= minus_infinity:
            raise UserError(f"tensor {name} of {where} holds NaN or infinity: it comes from a run that diverged")
