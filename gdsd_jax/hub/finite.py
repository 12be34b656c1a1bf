"""Refuses weights that hold NaN or an infinity."""

from __future__ import annotations

import numpy as np

from gdsd_jax.hub.files import FLOATS
from gdsd_jax.runtime.errors import UserError

_PIECE = 1 << 17  # entries
# The exponent bits of each float format. Only NaN and the infinities have all of them set.
_EXPONENTS = {"F64": 0x7FF0000000000000, "F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}


def require_finite(data: np.ndarray, name: str, where: object) -> None:
    """Raises UserError if a float array holds NaN or an infinity."""
    code = next(code for code, dtype in FLOATS.items() if dtype == data.dtype)
    bits, mask = data.view(f"u{data.dtype.itemsize}"), _EXPONENTS[code]
    flat = bits.reshape(-1) if bits.flags.c_contiguous else None
    # Piece by piece, so that the intermediate results stay in the processor's cache.
    pieces = [bits] if flat is None else (flat[at : at + _PIECE] for at in range(0, flat.size, _PIECE))
    if any(((piece & mask) == mask).any() for piece in pieces):
        raise UserError(f"tensor {name} of {where} holds NaN or infinity: it comes from a run that diverged")
