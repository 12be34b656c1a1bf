"""The state that training changes: trained parameters, the optimizer's state, and counters, from which keys derive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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
      key: the run's PRNG key; it never changes, and all keys of a run are folded from it and the counters.
      extras: the parameters that the method trains beside the policy, a pytree of float32 arrays, or None.
      extras_opt_state: the state of their optimizer, or None.
      reference: the trained part of a reference that moves, like `params`; None if the base is the reference.
      kl_scale: float32 scalar, the factor of the loss's KL if it is adapted, or None.
    """

    # The types are Any, because JAX's transformations also build the state from shapes, shardings and other leaves.
    params: Any
    opt_state: Any
    iteration: Any
    updates: Any
    key: Any
    extras: Any = None
    extras_opt_state: Any = None
    reference: Any = None
    kl_scale: Any = None


# The fields that are None in most runs.
OPTIONAL = ("extras", "extras_opt_state", "reference", "kl_scale")


class Beside(NamedTuple):
    """Describes the parts of a state beside the policy and its optimizer.

    extras: a function without arguments that makes the parameters which the method trains beside the policy, or None.
    optimizer: the optimizer of the extras, or None.
    reference: whether the run has a reference that moves.
    kl_scale: whether the weight of the loss's KL is adapted.
    """

    extras: Callable[[], Any] | None = None
    optimizer: optax.GradientTransformation | None = None
    reference: bool = False
    kl_scale: bool = False


NOTHING = Beside()


def init_state(params: Any, optimizer: optax.GradientTransformation, seed: int, beside: Beside = NOTHING) -> TrainState:
    """Returns a fresh state; its parameters are float32, whatever the dtype of `params`."""
    wide = lambda tree: jax.tree.map(lambda x: jnp.array(x, jnp.float32), tree)  # noqa: E731
    params = wide(params)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(params, optimizer.init(params), zero, jnp.copy(zero), jax.random.key(seed))
    if beside.extras is not None:
        extras = wide(beside.extras())
        state = state.replace(extras=extras, extras_opt_state=beside.optimizer.init(extras))
    if beside.reference:
        state = state.replace(reference=jax.tree.map(jnp.copy, params))
    return state.replace(kl_scale=jnp.ones(())) if beside.kl_scale else state


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
    """Returns the placement of a state (or of its shapes) on the current mesh.

    The optimizer's moments and a reference are placed as their parameters are; everything else is replicated.
    """
    everywhere = replicated(jax.sharding.get_mesh())
    params = parameter_shardings(model, state.params)

    def beside(moment: Any, place: Any, param: Any) -> Any:
        # An optimizer may leave a parameter to another optimizer, or keep factors of a moment, as Adafactor does.
        if isinstance(moment, optax.MaskedNode):
            return moment
        return place if moment.shape == param.shape else everywhere

    moments = optax.tree.map_params(
        optimizer, beside, state.opt_state, params, state.params, transform_non_params=lambda _: everywhere,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )  # fmt: skip
    extras, extras_opt_state, kl_scale = jax.tree.map(
        lambda _: everywhere, (state.extras, state.extras_opt_state, state.kl_scale)
    )
    reference = None if state.reference is None else params
    return TrainState(
        params, moments, everywhere, everywhere, everywhere, extras, extras_opt_state, reference, kl_scale
    )


def start_state(
    model: DenoiserConfig,
    optimizer: optax.GradientTransformation,
    seed: int,
    start: Callable[[Any], Any],
    base: Any,
    beside: Beside = NOTHING,
) -> tuple[TrainState, TrainState]:
    """Returns `init_state` of the parameters `start(base)`, of which each device makes its part, and the placement."""
    make = lambda base: init_state(start(base), optimizer, seed, beside)  # noqa: E731
    places = state_shardings(model, optimizer, jax.eval_shape(make, base))
    return jax.jit(make, out_shardings=places)(base), places


# ---------------------------------------------------------------------------------------------------------- saved form


@flax.struct.dataclass
class SavedState:
    """The fields that every state has, as they are saved."""

    params: Any
    opt_state: Any
    iteration: Any
    updates: Any
    key: Any


def saved_parts(state: TrainState) -> dict[str, Any]:
    """Returns the parts of a state that are saved: "state", which every run has, and "beside" for optional fields.

    Optional fields are a part of their own, because Orbax would refuse checkpoints of earlier versions without them.
    """
    fields = vars(state)
    beside = {name: fields[name] for name in OPTIONAL if fields[name] is not None}
    own = SavedState(**{name: value for name, value in fields.items() if name not in OPTIONAL})
    return {"state": own} | ({"beside": beside} if beside else {})


def to_save(state: TrainState) -> dict[str, Any]:
    """Returns `saved_parts` with the key as plain integers, which every checkpoint format can hold."""
    return saved_parts(state.replace(key=jax.random.key_data(state.key)))


def by_field(parts: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of all saved parts, by name."""
    fields = (part if isinstance(part, dict) else vars(part) for part in parts.values())
    return {name: value for part in fields for name, value in part.items()}


def from_saved(parts: dict[str, Any]) -> TrainState:
    """Returns the state from which `to_save` made these parts."""
    state = TrainState(**by_field(parts))
    return state.replace(key=jax.random.wrap_key_data(state.key))
