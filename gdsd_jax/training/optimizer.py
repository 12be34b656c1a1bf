"""Builds the optimizer of a run: clipped gradients, AdamW or another optimizer by name, and its learning rate."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gdsd_jax.config import OptimizerConfig
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.plugins import is_plugin, load_plugin

ADAMW = "optax:adamw"


def make_optimizer(
    config: OptimizerConfig, updates: int, setting: str = "config.optimizer"
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Builds gradient clipping followed by the optimizer `config.name`, and the learning-rate schedule.

    Args:
      updates: number of updates in the run, over which the schedule decays unless `config.schedule_updates` is set.
      setting: the name of `config`, for error messages.

    Raises:
      UserError: the schedule or the optimizer is unknown, or the optimizer does not accept its settings.
    """
    schedule = make_schedule(config, config.schedule_updates or updates, setting)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), _inner(config, schedule, setting)), schedule


def require_optimizer(config: OptimizerConfig, setting: str = "config.optimizer") -> None:
    """Tries an optimizer with settings of its own on small parameters, so that a bad one is found at the start.

    Raises:
      UserError: as for `make_optimizer`; the update fails; or parameters are not finite after two updates.
    """
    optimizer, _ = make_optimizer(config, 1, setting)
    if not config.settings:
        return
    params = {"layers": {"q": {"weight": jnp.ones((1, 2, 2))}}, "final_norm": jnp.ones(2)}

    @jax.jit
    def updated(params: Any) -> Any:
        gradient, state = jax.tree.map(jnp.ones_like, params), optimizer.init(params)
        for _ in range(2):
            changes, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, changes)
        return params

    with _its_settings(config, setting):
        found = jax.tree.leaves(updated(params))
    if not all(jnp.isfinite(x).all() for x in found):
        raise UserError(f"{setting}.settings do not fit {config.name!r}: parameters become infinite or NaN")


@contextlib.contextmanager
def _its_settings(config: OptimizerConfig, setting: str) -> Iterator[None]:
    """Turns an error of an optimizer into one that names its settings: each checks its own, if it does at all."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{setting}.settings do not fit {config.name!r}: {reason}") from error


def make_schedule(config: OptimizerConfig, updates: int, setting: str = "config.optimizer") -> optax.Schedule:
    """Builds the learning rate as a function of the number of finished updates.

    Raises:
      UserError: the schedule is unknown.
    """
    after = max(updates - config.warmup_updates, 1)
    shapes = {
        "constant": optax.constant_schedule(config.learning_rate),
        "linear": optax.linear_schedule(config.learning_rate, 0.0, after),
        "cosine": optax.cosine_decay_schedule(config.learning_rate, after),
    }
    if config.schedule not in shapes:
        raise UserError(f"{setting}.schedule {config.schedule!r} is not one of {', '.join(shapes)}")
    # The first update has the argument 0; a warm-up that begins at the rate 0 would waste it.
    warmup, rate = config.warmup_updates, config.learning_rate
    ramp = optax.linear_schedule(rate / max(warmup, 1), rate, max(warmup - 1, 1))
    return optax.join_schedules([ramp, shapes[config.schedule]], [config.warmup_updates])


def _inner(config: OptimizerConfig, schedule: optax.Schedule, setting: str) -> optax.GradientTransformation:
    """Builds the optimizer itself, without clipping; our AdamW takes the place of optax's."""
    settings = dict(config.settings)
    if config.name == ADAMW:
        settings = {"b1": config.b1, "b2": config.b2, "weight_decay": config.weight_decay} | settings
    if not is_plugin(config.name):
        raise UserError(f"{setting}.name {config.name!r} is not package.module:NAME of an optimizer")
    make = _adamw if config.name == ADAMW else load_plugin(config.name, f"{setting}.name")
    try:
        known = inspect.signature(make).parameters
    except (TypeError, ValueError) as error:
        raise UserError(f"{setting}.name {config.name!r} is not package.module:NAME of an optimizer: {error}") from None
    # Some arguments describe the parameters by functions, which a config file cannot give.
    ours = {"mask": decayed, "weight_decay_mask": decayed, "muon_weight_dimension_numbers": matrices}
    settings = {name: value for name, value in ours.items() if name in known} | settings
    with _its_settings(config, setting):
        return make(learning_rate=schedule, **settings)


def _adamw(learning_rate: optax.Schedule, weight_decay: float, **settings: Any) -> optax.GradientTransformation:
    """Builds AdamW with weight decay of the `decayed` parameters alone.

    Unlike a mask of optax, this decay keeps no state, so that older checkpoints still fit.
    """

    def decay(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda g, x, on: g + weight_decay * x if on else g, updates, params, decayed(params))

    return optax.chain(
        optax.scale_by_adam(**settings), optax.stateless(decay), optax.scale_by_learning_rate(learning_rate)
    )


def _by_path(decide: Callable[[list[str], Any], Any], params: Any) -> Any:
    """Maps `decide(names along the path, array)` over the parameters."""
    names = lambda path: [str(getattr(key, "key", getattr(key, "name", key))) for key in path]  # noqa: E731
    return jax.tree_util.tree_map_with_path(lambda path, x: decide(names(path), x), params)


def decayed(params: Any) -> Any:
    """Returns for every parameter whether it decays: matrices and tables do, norms and biases do not."""
    return _by_path(lambda names, _: names[-1] != "bias" and "norm" not in names[-1], params)


def matrices(params: Any) -> Any:
    """Returns for every parameter the axes that Muon orthogonalises, or None for tables and vectors, which Adam trains.

    The first axis of a stacked matrix numbers the layers, each of which has a matrix of its own (Muon: Jordan et al.
    2024, https://kellerjordan.github.io/posts/muon). A weight is `[out, in]`, the factors of an adapter `[in, out]`.
    """
    from optax.contrib import MuonDimensionNumbers

    weight, factor = (MuonDimensionNumbers(reduction_axis=i, output_axis=3 - i) for i in (2, 1))

    def axes(names: list[str], x: Any) -> MuonDimensionNumbers | None:
        if "layers" not in names or x.ndim != 3:
            return None
        return weight if names[-1] == "weight" else factor

    return _by_path(axes, params)
