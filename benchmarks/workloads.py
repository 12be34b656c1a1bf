"""Defines the measured workloads: sizes of model and rollout, the random weights that both sides share, and prompts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Workload(NamedTuple):
    """Sizes of a model, and of a rollout: `rows` prompts of P = `prompt` tokens, L = `completion` tokens in blocks."""

    width: int
    layers: int
    heads: int
    feed_forward: int
    vocabulary: int
    prompt: int
    completion: int
    block: int
    steps: int
    rows: int

    @property
    def mask_id(self) -> int:
        """Returns the id of the mask token, the last of the vocabulary."""
        return self.vocabulary - 1


WORKLOADS = {
    "W1": Workload(256, 6, 4, 768, 4096, 64, 64, 32, 64, 8),
    "W2": Workload(256, 4, 4, 768, 126464, 64, 64, 32, 32, 4),
    "8B": Workload(4096, 1, 32, 12288, 126464, 64, 64, 32, 8, 1),
    "tiny": Workload(32, 2, 2, 48, 300, 6, 8, 4, 8, 2),
}


def weights(shape: Workload) -> dict:
    """Draws float32 base parameters in our layout: matrices `[out, in]`, with the layers stacked on a leading axis."""
    draws = np.random.default_rng(0)
    d, f, n = shape.width, shape.feed_forward, shape.layers
    sizes = dict.fromkeys("qkvo", (d, d)) | {"gate": (f, d), "up": (f, d), "down": (d, f)}

    def normal(size: tuple[int, ...], scale: float) -> np.ndarray:
        return draws.standard_normal(size, np.float32) * np.float32(scale)

    layers = {name: {"weight": normal((n, *size), size[1] ** -0.5)} for name, size in sizes.items()}
    norms = {name: np.ones((n, d), np.float32) for name in ("attn_norm", "mlp_norm")}
    tables = {name: normal((shape.vocabulary, d), scale) for name, scale in (("embedding", 1.0), ("head", d**-0.5))}
    return {"layers": layers | norms, "final_norm": np.ones(d, np.float32)} | tables


def prompts(shape: Workload) -> np.ndarray:
    """Draws prompts, `[rows, P]` int32."""
    draws = np.random.default_rng(1)
    return draws.integers(0, shape.mask_id, (shape.rows, shape.prompt), dtype=np.int32)
