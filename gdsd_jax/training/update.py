"""Makes one inner update: draws views, scores the old policy and the reference, and accumulates the gradient.

The whole update is one compiled program; `inner_update` reads top to bottom, and each of its steps is one function.
Old, reference and new policy see the same views in micro-batches of the same shape, because in any other arrangement
rounding errors would exceed a log-ratio of 4e-4 nats summed over a completion.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gdsd_jax.config import ReferenceConfig
from gdsd_jax.denoiser import DenoiserConfig
from gdsd_jax.diffusion.scoring import Views, read_views
from gdsd_jax.methods import Batch, Method, Scores
from gdsd_jax.runtime.sharding import constrain
from gdsd_jax.runtime.streams import Stream, stream_key
from gdsd_jax.training.arrange import micro_batches, replicate
from gdsd_jax.training.between import adapted_scale, part_of
from gdsd_jax.training.state import TrainState, parameter_axes, policy

FROZEN = ReferenceConfig()


class Recipe(NamedTuple):
    """The static parts of an update: the model, the objective, the optimizer and the sizes of the pieces.

    microbatch_rows: rows per micro-batch.
    vocab_chunk: vocabulary entries whose logits exist at one time.
    inner_updates: updates per rollout, by which the updates on one rollout are numbered.
    update_rows: rows of the batch in one update; None: all of them.
    extras_optimizer: trains what the method trains beside the policy.
    reference: how the weight of the loss's KL is adapted.
    """

    config: DenoiserConfig
    method: Method
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    microbatch_rows: int
    vocab_chunk: int
    inner_updates: int = 1
    update_rows: int | None = None
    extras_optimizer: optax.GradientTransformation | None = None
    reference: ReferenceConfig = FROZEN


class Before(NamedTuple):
    """The policy that made the rollout, and what the method trained beside it by then."""

    params: Any
    extras: Any


def make_inner_update(
    config: DenoiserConfig,
    method: Method,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    microbatch_rows: int,
    vocab_chunk: int,
    inner_updates: int = 1,
    update_rows: int | None = None,
    extras_optimizer: optax.GradientTransformation | None = None,
    reference: ReferenceConfig = FROZEN,
    shardings: TrainState | None = None,
) -> Callable[[TrainState, Any, Any, Batch], tuple[TrainState, dict]]:
    """Compiles `update(state, base, old_params, batch, by_component=False) -> (state, metrics)`; see `inner_update`.

    The state is donated, and `by_component` is static.

    Args:
      shardings: the placement of the state, as `state_shardings` gives it; None leaves it to the compiler.
    """
    recipe = Recipe(
        config, method, optimizer, schedule, microbatch_rows, vocab_chunk, inner_updates, update_rows,
        extras_optimizer, reference,
    )  # fmt: skip

    def update(
        state: TrainState, base: Any, old_params: Any, batch: Batch, by_component: bool = False
    ) -> tuple[TrainState, dict]:
        return inner_update(recipe, state, base, old_params, batch, by_component)

    return jax.jit(update, donate_argnums=0, static_argnames="by_component", out_shardings=(shardings, None))


def inner_update(
    recipe: Recipe, state: TrainState, base: Any, old_params: Any, batch: Batch, by_component: bool
) -> tuple[TrainState, dict]:
    """Returns the state after one update on the batch or its next part, and its metrics as device scalars.

    Args:
      base: the frozen base; the trained parameters are in the state.
      old_params: trained part of the policy that made the rollout, or `Before` where the method has extras. None means
        that the policy has not moved since: the old score is then the stop-gradient of the new one, and costs no
        forward pass (unless the method couples rows through it).
      by_component: adds `grad/NAME`, the gradient norm of each component of the loss. Each component beyond the first
        costs a backward pass and memory for one more gradient.
    """
    old = old_params if old_params is None or isinstance(old_params, Before) else Before(old_params, state.extras)
    batch = batch.replace(iteration=state.iteration, inner_update=state.updates % recipe.inner_updates)
    if recipe.update_rows and recipe.update_rows < batch.tokens.shape[0]:
        batch = part_of(state.key, batch, recipe.update_rows, recipe.inner_updates)
    with jax.named_scope("views"):
        pieces = draw_pieces(recipe, stream_key(state.key, Stream.MASKS, state.updates), batch)
    with jax.named_scope("old_and_reference"):
        constants = prepare(recipe, state, base, old, batch, pieces)
    with jax.named_scope("gradient"):
        gradients, square, losses, metrics = accumulate(recipe, state, base, batch, pieces, constants, by_component)
        gradient, of_extras = total(gradients)
    with jax.named_scope("optimizer"):
        changes, opt_state = recipe.optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, changes)
        state = state.replace(params=params, opt_state=opt_state, updates=state.updates + 1)
    norm = optax.tree.norm(gradient)
    report = {f"policy/{name}": value for name, value in summaries(metrics).items()}
    report |= {"loss": jnp.sum(losses), "grad/norm": norm, "lr": jnp.asarray(recipe.schedule(state.updates - 1))}
    report["update/norm"] = optax.tree.norm(changes)
    if by_component:
        report |= {f"grad/{name}": optax.tree.norm(part) for name, (part, _) in gradients.items()}
    # Rows of a group are not independent of each other: their advantages sum to zero.
    if len(losses) > 1 and recipe.microbatch_rows % batch.group_size == 0:
        report["grad/signal_to_noise"] = signal_to_noise(norm, square, len(losses))
    if state.extras is not None:
        report["grad/extras"] = optax.tree.norm(of_extras)
        changes, opt_state = recipe.extras_optimizer.update(of_extras, state.extras_opt_state, state.extras)
        state = state.replace(extras=optax.apply_updates(state.extras, changes), extras_opt_state=opt_state)
    if state.kl_scale is not None:
        report["policy/kl_scale"] = state.kl_scale
        state = state.replace(kl_scale=adapted_scale(state.kl_scale, report["policy/kl"], recipe.reference))
    return state, report


# ------------------------------------------------------------------------------------------------- views and scores


def draw_pieces(recipe: Recipe, key: jax.Array, batch: Batch) -> tuple[Batch, Views]:
    """Draws the masked views of a batch and returns both in micro-batches."""
    views = recipe.method.views(recipe.method.masks(key, batch), batch)
    rows = batch.replace(iteration=None, inner_update=None)
    return micro_batches(rows, recipe.microbatch_rows), micro_batches(views, recipe.microbatch_rows, axis=1)


def score(
    recipe: Recipe,
    base: Any,
    params: Any,
    extras: Any,
    batch: Batch,
    views: Views,
    *,
    dropout_key: jax.Array | None = None,
    extra: tuple = (),
) -> tuple[Scores, dict]:
    """Scores one micro-batch and returns its reads too; None for `params` means the base alone.

    Args:
      extra: reads in addition to those of the method.
    """
    weights, lora = (base, None) if params is None else policy(base, params)
    reads = read_views(
        recipe.config, weights, lora, batch.tokens, views, recipe.method.reads + extra,
        prompt_mask=batch.prompt_mask, dropout_key=dropout_key, chunk=recipe.vocab_chunk,
    )  # fmt: skip
    return recipe.method.scores(reads, views, extras), reads


def score_all(
    recipe: Recipe,
    state: TrainState,
    base: Any,
    params: Any,
    extras: Any,
    pieces: tuple[Batch, Views],
    *,
    dropout: bool = False,
) -> Scores:
    """Scores all micro-batches without a gradient and returns the scores of the whole batch, rows first.

    With `dropout` the adapter uses the dropout masks of this update's gradient, so that a ratio of two policies
    measures how far apart they are and not a difference of their dropout.
    """

    def one(inputs: tuple) -> Scores:
        index, piece = inputs
        key = dropout_key(recipe, state, index) if dropout else None
        return score(recipe, base, params, extras, *piece, dropout_key=key)[0]

    count = pieces[0].tokens.shape[0]
    scores = jax.lax.map(one, (jnp.arange(count), pieces))
    return jax.tree.map(lambda x: replicate(x).reshape(-1, *x.shape[2:]), scores)


def dropout_key(recipe: Recipe, state: TrainState, index: jax.Array) -> jax.Array:
    """Returns the key of the adapter's dropout in one micro-batch of an update."""
    return jax.random.fold_in(stream_key(state.key, Stream.DROPOUT, state.updates), index * recipe.microbatch_rows)


def prepare(
    recipe: Recipe, state: TrainState, base: Any, old: Before | None, batch: Batch, pieces: tuple[Batch, Views]
) -> Any:
    """Scores the policies that the method's constants need, and returns these constants for the whole batch."""
    method, now = recipe.method, Before(state.params, state.extras)
    before, moved = old or now, old is not None
    old = ref = current = None
    if method.old == "own_masks":
        own = draw_pieces(recipe, stream_key(state.key, Stream.OLD_MASKS, state.iteration), batch)
        old = score_all(recipe, state, base, *before, own)
    elif method.old == "always" or (method.old == "ratio" and moved):
        old = score_all(recipe, state, base, *before, pieces, dropout=True)
    if method.needs_reference:
        ref = score_all(recipe, state, base, state.reference, state.extras, pieces)
    if method.current:
        current = score_all(recipe, state, base, *now, pieces, dropout=True)
    return method.constants(batch, old, ref, current)


# --------------------------------------------------------------------------------------------------------- gradient


def accumulate(
    recipe: Recipe,
    state: TrainState,
    base: Any,
    batch: Batch,
    pieces: tuple[Batch, Views],
    constants: Any,
    by_component: bool,
) -> tuple[dict, jax.Array, jax.Array, dict]:
    """Sums the gradients of all micro-batches, one micro-batch after another.

    Returns:
      The gradient of each component of the loss (or of their sum, as "loss") in the parameters and in the extras, the
      sum of the pieces' squared norms, and the losses and metrics of each micro-batch.
    """
    gradients_of = functools.partial(piece_gradients, recipe, state, base, batch, by_component)

    def add(carry: tuple[dict, jax.Array], inputs: tuple) -> tuple[tuple, tuple]:
        gradients, square = carry
        found, reported = gradients_of(inputs)
        square = square + optax.tree.norm(total(found)[0]) ** 2
        return (jax.tree.map(jnp.add, gradients, found), square), reported

    constants = micro_batches(constants, recipe.microbatch_rows)
    inputs = jnp.arange(batch.tokens.shape[0] // recipe.microbatch_rows), pieces, constants
    shapes, _ = jax.eval_shape(gradients_of, jax.tree.map(lambda x: x[0], inputs))
    zeros = {name: in_place(recipe, zero) for name, zero in optax.tree.zeros_like(shapes).items()}
    (gradients, square), (losses, metrics) = jax.lax.scan(add, (zeros, jnp.zeros(())), inputs)
    return gradients, square, losses, metrics


def piece_gradients(
    recipe: Recipe, state: TrainState, base: Any, batch: Batch, by_component: bool, inputs: tuple
) -> tuple[dict, tuple]:
    """Returns the gradients of one micro-batch, by component or of the sum alone, with its loss and metrics."""
    losses_of = lambda params, extras: piece_losses(recipe, state, base, batch, params, extras, *inputs)  # noqa: E731
    losses, pull_back, metrics = jax.vjp(losses_of, state.params, state.extras, has_aux=True)
    ones, none = (jax.tree.map(fill, losses) for fill in (jnp.ones_like, jnp.zeros_like))
    chosen = {name: none | {name: ones[name]} for name in losses} if by_component else {"loss": ones}
    gradients = {name: in_place(recipe, pull_back(weights)) for name, weights in chosen.items()}
    return gradients, (total(losses), metrics)


def piece_losses(
    recipe: Recipe,
    state: TrainState,
    base: Any,
    batch: Batch,
    params: Any,
    extras: Any,
    index: jax.Array,
    piece: tuple[Batch, Views],
    constants: Any,
) -> tuple[dict, dict]:
    """Returns the components of one micro-batch's loss, and the metrics of its rows."""
    key = dropout_key(recipe, state, index)
    new, reads = score(recipe, base, params, extras, *piece, dropout_key=key, extra=("entropy_value",))
    losses, metrics = recipe.method.objective(new, constants)
    if state.kl_scale is not None:
        losses |= {"kl": state.kl_scale * losses["kl"]}
    # A token that is visible in its view, or that a step does not commit, is not predicted, so it does not count.
    counted = piece[1].predicted() * piece[0].completion_mask
    metrics |= {"entropy_total": jnp.sum(reads["entropy_value"] * counted, axis=(0, 2))}
    metrics |= {"hidden_total": jnp.sum(counted, axis=(0, 2))}
    return {name: jnp.sum(value) for name, value in losses.items()}, metrics


def summaries(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Summarises the rows of a batch: the maximum of names that end in `_max`, the deviation of `_std`, else the mean.

    Args:
      metrics: `[micro-batches, rows]` each; "entropy_total" and "hidden_total" become "entropy", per hidden token.
    """
    of = {"max": jnp.max, "std": jnp.std}
    found = {name: of.get(name.rpartition("_")[2], jnp.mean)(value) for name, value in metrics.items()}
    per_token = found.pop("entropy_total") / jnp.maximum(found.pop("hidden_total"), jnp.finfo(jnp.float32).tiny)
    return found | {"entropy": per_token}


def signal_to_noise(norm: jax.Array, square_sum: jax.Array, pieces: int) -> jax.Array:
    """Estimates the squared norm of the expected gradient over the variance of its estimate, from independent pieces.

    The expected squared norm of a mean of pure noise is its variance, so the variance is subtracted. Pure noise then
    gives about 0 on average, and its single values are negative about half of the time.

    Args:
      norm: norm of the sum of the pieces.
      square_sum: sum of the pieces' squared norms.
      pieces: number of micro-batches.
    """
    mean_square = (norm / pieces) ** 2
    variance = (square_sum / pieces - mean_square) * pieces / (pieces - 1)
    noise = variance / pieces
    return (mean_square - noise) / jnp.maximum(noise, jnp.finfo(jnp.float32).tiny)


# ------------------------------------------------------------------------------------------------------ arrangement


def in_place(recipe: Recipe, gradients: tuple[Any, Any]) -> tuple[Any, Any]:
    """Constrains the gradients in the parameters and in the extras to the placement of what they are gradients of."""
    gradient, of_extras = gradients
    placed = jax.tree.map(constrain, gradient, parameter_axes(recipe.config, gradient))
    return placed, jax.tree.map(replicate, of_extras)


def total(parts: dict[str, Any]) -> Any:
    """Returns the sum of pytrees that have the same structure."""
    return jax.tree.map(lambda *values: sum(values), *parts.values())
