"""Low-rank adapters as data: a policy is the frozen base with one adapter, or the base alone.

    y = x W^T + (alpha / rank) * dropout(x) A B                                                     (arXiv 2106.09685)

A fresh adapter has `A ~ U(-1/sqrt(in), 1/sqrt(in))` and `B = 0`, so that it changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from gdsd_jax.denoiser.config import DenoiserConfig
from gdsd_jax.runtime.errors import UserError

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@flax.struct.dataclass
class LoRA:
    """The weights of an adapter, and the settings that apply them.

    Attributes:
      weights: `{"layers": {target: {"a": [N, in, r], "b": [N, r, out]}}}`, float32; the N layers are the first axis.
      rank, alpha, targets, dropout: static. The targets are names from `TARGETS`. Dropout acts only where the denoiser
        is given a `dropout_key`.
    """

    weights: Any
    rank: int = flax.struct.field(pytree_node=False)
    alpha: float = flax.struct.field(pytree_node=False)
    targets: tuple[str, ...] = flax.struct.field(pytree_node=False)
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)


def target_shapes(config: DenoiserConfig) -> dict[str, tuple[int, int]]:
    """Returns the shape `(in, out)` of each of the seven matrices of a layer."""
    d, f = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {"q": (d, q), "k": (d, kv), "v": (d, kv), "o": (q, d), "gate": (d, f), "up": (d, f), "down": (f, d)}


def init_lora(
    config: DenoiserConfig, key: jax.Array, *, rank: int, alpha: float, targets: Sequence[str], dropout: float = 0.0
) -> LoRA:
    """Draws a fresh adapter, which does not change the outputs of the base.

    Raises:
      UserError: the rank is below 1 or above what every target can have, the dropout is outside [0, 1), or a target is
        unknown or repeated.
    """
    if rank < 1:
        raise UserError(f"adapter rank {rank} must be at least 1: change config.lora.rank")
    if not 0.0 <= dropout < 1.0:
        raise UserError(f"adapter dropout {dropout} must lie in [0, 1): change config.lora.dropout")
    unknown = [t for t in targets if t not in TARGETS]
    if unknown or not targets or len(set(targets)) != len(targets):
        raise UserError(
            f"adapter targets {tuple(targets)} must be distinct names out of {TARGETS}: change config.lora.targets"
        )
    shapes = target_shapes(config)
    most = max(min(shapes[target]) for target in targets)
    if rank > most:
        raise UserError(
            f"adapter rank {rank} is above {most}, the largest rank of a matrix that gets an adapter: lower "
            "config.lora.rank, or set it to 0 to train all parameters"
        )
    weights = {}
    for target, subkey in zip(targets, jax.random.split(key, len(targets)), strict=True):
        fan_in, fan_out = shapes[target]
        bound = fan_in**-0.5
        a = jax.random.uniform(subkey, (config.num_layers, fan_in, rank), jnp.float32, -bound, bound)
        weights[target] = {"a": a, "b": jnp.zeros((config.num_layers, rank, fan_out), jnp.float32)}
    return LoRA({"layers": weights}, rank=rank, alpha=float(alpha), targets=tuple(targets), dropout=float(dropout))
