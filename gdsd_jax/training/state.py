"""What training changes: trained parameters, the optimizer's state, and the counters that all randomness hangs on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from gdsd_jax.denoiser import DenoiserConfig, LoRA, logical_axes
from gdsd_jax.runtime.sharding import replicated, shardings


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


def init_state(params: Any, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """A fresh state; parameters are trained in float32 whatever dtype they come in."""
    params = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(params, optimizer.init(params), zero, jnp.copy(zero), jax.random.key(seed))


def policy(base: Any, params: Any) -> tuple[Any, LoRA | None]:
    """`(base, lora)` of the policy whose trained part is `params`: an adapter on the base, or a base of its own."""
    return (base, params) if isinstance(params, LoRA) else (params, None)


def parameter_axes(model: DenoiserConfig, params: Any) -> Any:
    """Logical axes of trained parameters, in their structure."""
    return params.replace(weights=logical_axes(model, params)) if isinstance(params, LoRA) else logical_axes(model)


def parameter_shardings(model: DenoiserConfig, params: Any) -> Any:
    """Where trained parameters (or their shapes) lie on the current mesh."""
    return shardings(jax.sharding.get_mesh(), parameter_axes(model, params), params)


def state_shardings(model: DenoiserConfig, optimizer: optax.GradientTransformation, state: Any) -> TrainState:
    """Where a state (or its shapes) lies: the optimizer's moments beside their parameters, the rest on every device."""
    everywhere = replicated(jax.sharding.get_mesh())
    params = parameter_shardings(model, state.params)

    def beside(moment: Any, place: Any, param: Any) -> Any:
        # An optimizer may leave a parameter to another one, or keep less than a moment of it, as Adafactor does.
        if isinstance(moment, optax.MaskedNode):
            return moment
        return place if moment.shape == param.shape else everywhere

    moments = optax.tree.map_params(
        optimizer, beside, state.opt_state, params, state.params, transform_non_params=lambda _: everywhere,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )  # fmt: skip
    return TrainState(params, moments, everywhere, everywhere, everywhere)


def start_state(
    model: DenoiserConfig,
    optimizer: optax.GradientTransformation,
    seed: int,
    start: Callable[[Any], Any],
    base: Any,
) -> tuple[TrainState, TrainState]:
    """`init_state` of the parameters `start(base)`, each device making its own part, and where the parts lie."""
    make = lambda base: init_state(start(base), optimizer, seed)  # noqa: E731
    places = state_shardings(model, optimizer, jax.eval_shape(make, base))
    return jax.jit(make, out_shardings=places)(base), places
