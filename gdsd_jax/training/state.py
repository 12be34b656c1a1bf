"""What training changes: trained parameters, the optimizer's state, and the counters that all randomness hangs on."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from gdsd_jax.config import OptimizerConfig
from gdsd_jax.denoiser import LoRA
from gdsd_jax.errors import UserError


@flax.struct.dataclass
class TrainState:
    """Attributes:
    params: the trained policy: an adapter, or float32 base parameters.
    opt_state: optax state.
    iteration, updates: int32 scalars, finished iterations and optimizer updates.
    key: the run's PRNG key; never advanced, only folded with the counters.
    """

    # Any, because transformations of a pytree put other things than arrays in its place.
    params: Any
    opt_state: Any
    iteration: Any
    updates: Any
    key: Any


def make_optimizer(config: OptimizerConfig, updates: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Clipped AdamW and its learning-rate schedule over `updates` updates.

    Raises:
      UserError: an unknown schedule.
    """
    after = max(updates - config.warmup_updates, 1)
    shapes = {
        "constant": optax.constant_schedule(config.learning_rate),
        "linear": optax.linear_schedule(config.learning_rate, 0.0, after),
        "cosine": optax.cosine_decay_schedule(config.learning_rate, after),
    }
    if config.schedule not in shapes:
        raise UserError(f"optimizer schedule {config.schedule!r} is not one of {', '.join(shapes)}")
    # The count is that of finished updates; a warm-up from zero would waste the first one.
    warmup, rate = config.warmup_updates, config.learning_rate
    ramp = optax.linear_schedule(rate / max(warmup, 1), rate, max(warmup - 1, 1))
    schedule = optax.join_schedules([ramp, shapes[config.schedule]], [config.warmup_updates])
    adamw = optax.adamw(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw), schedule


def init_state(params: Any, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """A fresh state; parameters are trained in float32 whatever dtype they come in."""
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(params, optimizer.init(params), zero, jnp.copy(zero), jax.random.key(seed))


def policy(base: Any, params: Any) -> tuple[Any, LoRA | None]:
    """`(base, lora)` of the policy whose trained part is `params`: an adapter on the base, or a base of its own."""
    return (base, params) if isinstance(params, LoRA) else (params, None)
