"""Checks and leaves out stored tensors that follow from other tensors or from `config.json`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gdsd_jax.denoiser import DenoiserConfig
from gdsd_jax.families import family_of
from gdsd_jax.hub.files import FLOATS, Reader, Stored
from gdsd_jax.runtime.errors import UserError

_ROWS_AT_A_TIME = 4096


def without_redundant(tensors: dict[str, Stored], config: DenoiserConfig, reader: Reader) -> dict[str, Stored]:
    """Returns the tensors without a head that repeats a tied embedding and without buffers of the rotary embedding.

    Raises:
      UserError: one of the tensors left out differs from what it should repeat, or the head is neither stored nor tied.
    """
    rows = {row.path: row.name for row in family_of(config).rows}
    kept = dict(tensors)
    head, embedding = (tensors.get(rows.get((path,))) for path in ("head", "embedding"))
    if not config.tied_head and head is None and embedding is not None:
        raise UserError(
            f"{embedding.file.parent} has no head {rows[('head',)]}, and config.json does not tie it to the embedding: "
            "if the embedding is the head, set tie_word_embeddings (or weight_tying) to true there"
        )
    if config.tied_head and head is not None and embedding is not None:
        if not _equal(head, embedding, reader):
            raise UserError(
                f"{head.file} holds a head {rows[('head',)]} that differs from the embedding, but config.json ties the "
                "two: correct tie_word_embeddings (or weight_tying) there"
            )
        del kept[rows[("head",)]]
    for name, stored in tensors.items():
        _, _, kind = name.rpartition("rotary_emb.")
        if kind == name or kind not in _BUFFERS or stored.dtype not in FLOATS:
            continue
        found = reader.tensor(stored._replace(shape=(int(np.prod(stored.shape)),))).astype(np.float64).ravel()
        wanted = _BUFFERS[kind](config, found.size)
        # The tolerance follows the stored dtype; cosines of large angles also lose the digits that float32 angles lose.
        tolerance = 2e-2 if stored.dtype in ("BF16", "F16") else 1e-3 if "cached" in kind else 1e-6
        if wanted is None or not np.allclose(found, wanted, rtol=tolerance, atol=tolerance if "cached" in kind else 0):
            raise UserError(
                f"{stored.file} holds a buffer {name} that does not follow from config.json: its positions are scaled, "
                "which this denoiser does not compute"
            )
        del kept[name]
    return kept


def _equal(one: Stored, other: Stored, reader: Reader) -> bool:
    """Returns whether two stored matrices have the same dtype, shape and bytes."""
    if (one.shape, one.dtype) != (other.shape, other.dtype) or one.dtype not in FLOATS:
        return False
    rows, columns = one.matrix
    for first in range(0, rows, _ROWS_AT_A_TIME):
        span = (first, min(first + _ROWS_AT_A_TIME, rows))
        pieces = [reader.block(stored, span, (0, columns)).tobytes() for stored in (one, other)]
        if pieces[0] != pieces[1]:
            return False
    return True


def _frequencies(config: DenoiserConfig, size: int) -> np.ndarray | None:
    """Returns the frequencies of the rotary embedding; None if there are not `size` of them."""
    if size != config.head_dim // 2:
        return None
    return config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)


def _table(function: np.ufunc) -> Callable[[DenoiserConfig, int], np.ndarray | None]:
    """Returns a function that computes the cosines or sines of as many positions as `size` entries hold."""

    def values(config: DenoiserConfig, size: int) -> np.ndarray | None:
        if size % config.head_dim:
            return None
        angles = np.arange(size // config.head_dim)[:, None] * _frequencies(config, config.head_dim // 2)
        return function(np.concatenate([angles, angles], axis=1)).ravel()

    return values


_BUFFERS = {
    "inv_freq": _frequencies,
    "original_inv_freq": _frequencies,
    "cos_cached": _table(np.cos),
    "sin_cached": _table(np.sin),
}
