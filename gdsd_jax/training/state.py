"""The state that training changes: trained parameters, the optimizer's state, and counters that select random keys."""

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
    """The state of a training run.

    Attributes:
      params: the trained part of the policy: an adapter, or float32 base parameters.
      opt_state: the optimizer's optax state.
      iteration, updates: int32 scalars, the numbers of finished iterations and of optimizer updates.
      key: the run's PRNG key; never advanced, only folded with the counters.
    """

    # The type is Any, because transformations of a pytree put other things than arrays in these places.
    params: Any
    opt_state: Any
    iteration: Any
    updates: Any
    key: Any


def init_state(params: Any, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """Returns a fresh state; parameters are trained in float32, whatever dtype they come in."""
    params = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(params, optimizer.init(params), zero, jnp.copy(zero), jax.random.key(seed))


def policy(base: Any, params: Any) -> tuple[Any, LoRA | None]:
    """Returns `(base, lora)` of the policy whose trained part is `params`: an adapter, or a base without an adapter."""
    return (base, params) if isinstance(params, LoRA) else (params, None)


def parameter_axes(model: DenoiserConfig, params: Any) -> Any:
    """Returns the logical axes of trained parameters, in the structure of the parameters."""
    return params.replace(weights=logical_axes(model, params)) if isinstance(params, LoRA) else logical_axes(model)


def parameter_shardings(model: DenoiserConfig, params: Any) -> Any:
    """Returns the placement of trained parameters (or of their shapes) on the current mesh."""
    return shardings(jax.sharding.get_mesh(), parameter_axes(model, params), params)


def state_shardings(model: DenoiserConfig, optimizer: optax.GradientTransformation, state: Any) -> TrainState:
    """Returns the placement of a state (or of its shapes).

    The optimizer's moments lie beside their parameters; counters, key and anything else lie on every device.
    """
    everywhere = replicated(jax.sharding.get_mesh())
    params = parameter_shardings(model, state.params)

    def beside(moment: Any, place: Any, param: Any) -> Any:
        # An optimizer may leave a parameter to another optimizer, or keep less than a moment of it, as Adafactor does.
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
    """Returns `init_state` of the parameters `start(base)`, each device making its own part, and its placement."""
    make = lambda base: init_state(start(base), optimizer, seed)  # noqa: E731
    places = state_shardings(model, optimizer, jax.eval_shape(make, base))
    return jax.jit(make, out_shardings=places)(base), places
