"""Makes one inner update: draws views, scores the old policy and the reference, and accumulates the gradient.

The whole update is one compiled program. `inner_update` is the walk through it; each of its steps is one function. Old,
reference and new policy are scored on the same views in micro-batches of the same shape, because otherwise their
rounding would differ by more than the recipes' clip of 4e-4 nats per completion.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gdsd_jax.config import ReferenceConfig, TrainConfig
from gdsd_jax.denoiser import DenoiserConfig
from gdsd_jax.diffusion.scoring import Views, read_views
from gdsd_jax.methods import Batch, Method, Scores
from gdsd_jax.runtime.sharding import constrain
from gdsd_jax.runtime.streams import Stream, stream_key
from gdsd_jax.training.arrange import micro_batches, replicate
from gdsd_jax.training.between import adapted_scale, part_of
from gdsd_jax.training.state import TrainState, parameter_axes, policy

FROZEN = ReferenceConfig()


class UpdateSpec(NamedTuple):
    """The static parts of an update.

    config: the denoiser.
    schedule: the learning rate, for the metrics.
    microbatch_rows: rows per micro-batch.
    vocab_chunk: vocabulary entries whose logits exist at one time.
    inner_updates: updates on each rollout.
    update_rows: rows of the batch in one update; None: all of them.
    extras_optimizer: the optimizer of the parameters that the method trains beside the policy, or None.
    reference: settings by which the weight of the loss's KL is adapted.
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

    @classmethod
    def of_run(
        cls,
        run: TrainConfig,
        model: DenoiserConfig,
        method: Method,
        optimizer: optax.GradientTransformation,
        schedule: optax.Schedule,
        extras_optimizer: optax.GradientTransformation | None = None,
    ) -> UpdateSpec:
        """Returns the static parts of the updates of a run."""
        return cls(
            model, method, optimizer, schedule, run.microbatch_rows, run.model.vocab_chunk, run.inner_updates,
            run.update_rows, extras_optimizer, run.reference,
        )  # fmt: skip


class Before(NamedTuple):
    """The trained part of the policy that made the rollout, and the method's extras at that time."""

    params: Any
    extras: Any


def make_inner_update(
    spec: UpdateSpec, shardings: TrainState | None = None
) -> Callable[[TrainState, Any, Any, Batch], tuple[TrainState, dict]]:
    """Compiles `update(state, base, old_params, batch, by_component=False) -> (state, metrics)`; see `inner_update`.

    The state is donated, and `by_component` is static.

    Args:
      shardings: the placement of the state, as `state_shardings` gives it; None leaves it to the compiler.
    """

    def update(
        state: TrainState, base: Any, old_params: Any, batch: Batch, by_component: bool = False
    ) -> tuple[TrainState, dict]:
        return inner_update(spec, state, base, old_params, batch, by_component)

    return jax.jit(update, donate_argnums=0, static_argnames="by_component", out_shardings=(shardings, None))


def inner_update(
    spec: UpdateSpec, state: TrainState, base: Any, old_params: Any, batch: Batch, by_component: bool
) -> tuple[TrainState, dict]:
    """Returns the state after one update on the batch or its next part, and its metrics as device scalars.

    Args:
      base: the frozen base; the trained parameters are in the state.
      old_params: the trained part of the policy that made the rollout, or a `Before` if the method has extras. None
        means that the policy has not changed since. The old score is then the stop-gradient of the new one and costs no
        forward pass, unless the method couples rows through it.
      by_component: adds `grad/NAME`, the gradient norm of each component of the loss. Each component beyond the first
        costs a backward pass and the memory of a gradient.
    """
    old = old_params if old_params is None or isinstance(old_params, Before) else Before(old_params, state.extras)
    batch = batch.replace(iteration=state.iteration, inner_update=state.updates % spec.inner_updates)
    if spec.update_rows and spec.update_rows < batch.tokens.shape[0]:
        batch = part_of(state.key, batch, spec.update_rows, spec.inner_updates)
    with jax.named_scope("views"):
        pieces = draw_pieces(spec, stream_key(state.key, Stream.MASKS, state.updates), batch)
    with jax.named_scope("old_and_reference"):
        constants = prepare(spec, state, base, old, batch, pieces)
    with jax.named_scope("gradient"):
        gradients, square, losses, metrics = accumulate(spec, state, base, batch, pieces, constants, by_component)
        gradient, of_extras = total(gradients)
    with jax.named_scope("optimizer"):
        changes, opt_state = spec.optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, changes)
        state = state.replace(params=params, opt_state=opt_state, updates=state.updates + 1)
    norm = optax.tree.norm(gradient)
    report = {f"policy/{name}": value for name, value in summaries(metrics).items()}
    report |= {"loss": jnp.sum(losses), "grad/norm": norm, "lr": jnp.asarray(spec.schedule(state.updates - 1))}
    report["update/norm"] = optax.tree.norm(changes)
    if by_component:
        report |= {f"grad/{name}": optax.tree.norm(part) for name, (part, _) in gradients.items()}
    # Micro-batches are independent only if they hold whole groups, because the advantages of a group sum to zero.
    if len(losses) > 1 and spec.microbatch_rows % batch.group_size == 0:
        report["grad/signal_to_noise"] = signal_to_noise(norm, square, len(losses))
    if state.extras is not None:
        report["grad/extras"] = optax.tree.norm(of_extras)
        changes, opt_state = spec.extras_optimizer.update(of_extras, state.extras_opt_state, state.extras)
        state = state.replace(extras=optax.apply_updates(state.extras, changes), extras_opt_state=opt_state)
    if state.kl_scale is not None:
        report["policy/kl_scale"] = state.kl_scale
        state = state.replace(kl_scale=adapted_scale(state.kl_scale, report["policy/kl"], spec.reference))
    return state, report


# ------------------------------------------------------------------------------------------------- views and scores


def draw_pieces(spec: UpdateSpec, key: jax.Array, batch: Batch) -> tuple[Batch, Views]:
    """Draws the masked views of a batch, and returns batch and views in micro-batches."""
    views = spec.method.views(spec.method.masks(key, batch), batch)
    rows = batch.replace(iteration=None, inner_update=None)
    return micro_batches(rows, spec.microbatch_rows), micro_batches(views, spec.microbatch_rows, axis=1)


def score(
    spec: UpdateSpec,
    base: Any,
    params: Any,
    extras: Any,
    batch: Batch,
    views: Views,
    *,
    dropout_key: jax.Array | None = None,
    extra: tuple = (),
) -> tuple[Scores, dict]:
    """Scores one micro-batch, and returns its reads too.

    Args:
      params: the trained part of the scored policy; None: the base alone.
      extras: the parameters that the method trains beside the policy, or None.
      extra: names of further reads.
    """
    weights, lora = (base, None) if params is None else policy(base, params)
    reads = read_views(
        spec.config, weights, lora, batch.tokens, views, spec.method.reads + extra,
        prompt_mask=batch.prompt_mask, dropout_key=dropout_key, chunk=spec.vocab_chunk,
    )  # fmt: skip
    return spec.method.scores(reads, views, extras), reads


def score_all(
    spec: UpdateSpec,
    state: TrainState,
    base: Any,
    params: Any,
    extras: Any,
    pieces: tuple[Batch, Views],
    *,
    dropout: bool = False,
) -> Scores:
    """Scores all micro-batches without a gradient, and returns the scores of the whole batch, rows first.

    With `dropout`, the adapter uses the same dropout masks as this update's gradient, so that the ratio of two policies
    does not contain a difference of their dropout.
    """

    def one(inputs: tuple) -> Scores:
        index, piece = inputs
        key = dropout_key(spec, state, index) if dropout else None
        return score(spec, base, params, extras, *piece, dropout_key=key)[0]

    count = pieces[0].tokens.shape[0]
    scores = jax.lax.map(one, (jnp.arange(count), pieces))
    return jax.tree.map(lambda x: replicate(x).reshape(-1, *x.shape[2:]), scores)


def dropout_key(spec: UpdateSpec, state: TrainState, index: jax.Array) -> jax.Array:
    """Returns the key of the adapter's dropout in the micro-batch `index` of an update."""
    return jax.random.fold_in(stream_key(state.key, Stream.DROPOUT, state.updates), index * spec.microbatch_rows)


def prepare(
    spec: UpdateSpec, state: TrainState, base: Any, old: Before | None, batch: Batch, pieces: tuple[Batch, Views]
) -> Any:
    """Scores the policies that the method's `prepare` needs, and returns its constants for the whole batch."""
    method, now = spec.method, Before(state.params, state.extras)
    before, moved = old or now, old is not None
    old = ref = current = None
    if method.old == "own_masks":
        own = draw_pieces(spec, stream_key(state.key, Stream.OLD_MASKS, state.iteration), batch)
        old = score_all(spec, state, base, *before, own)
    elif method.old == "always" or (method.old == "ratio" and moved):
        old = score_all(spec, state, base, *before, pieces, dropout=True)
    if method.needs_reference:
        ref = score_all(spec, state, base, state.reference, state.extras, pieces)
    if method.current:
        current = score_all(spec, state, base, *now, pieces, dropout=True)
    return method.constants(batch, old, ref, current)


# --------------------------------------------------------------------------------------------------------- gradient


def accumulate(
    spec: UpdateSpec,
    state: TrainState,
    base: Any,
    batch: Batch,
    pieces: tuple[Batch, Views],
    constants: Any,
    by_component: bool,
) -> tuple[dict, jax.Array, jax.Array, dict]:
    """Sums the gradients of all micro-batches, one micro-batch after another.

    Returns:
      The gradients in the parameters and in the extras of each component of the loss (or of their sum, as "loss"); the
      sum over micro-batches of the squared gradient norm; the losses and the metrics of each micro-batch.
    """
    gradients_of = functools.partial(piece_gradients, spec, state, base, batch, by_component)

    def add(carry: tuple[dict, jax.Array], inputs: tuple) -> tuple[tuple, tuple]:
        gradients, square = carry
        found, reported = gradients_of(inputs)
        square = square + optax.tree.norm(total(found)[0]) ** 2
        return (jax.tree.map(jnp.add, gradients, found), square), reported

    constants = micro_batches(constants, spec.microbatch_rows)
    inputs = jnp.arange(batch.tokens.shape[0] // spec.microbatch_rows), pieces, constants
    shapes, _ = jax.eval_shape(gradients_of, jax.tree.map(lambda x: x[0], inputs))
    zeros = {name: in_place(spec, zero) for name, zero in optax.tree.zeros_like(shapes).items()}
    (gradients, square), (losses, metrics) = jax.lax.scan(add, (zeros, jnp.zeros(())), inputs)
    return gradients, square, losses, metrics


def piece_gradients(
    spec: UpdateSpec, state: TrainState, base: Any, batch: Batch, by_component: bool, inputs: tuple
) -> tuple[dict, tuple]:
    """Returns the gradients of one micro-batch, by component or of their sum as "loss", and its loss and metrics."""
    losses_of = lambda params, extras: piece_losses(spec, state, base, batch, params, extras, *inputs)  # noqa: E731
    losses, pull_back, metrics = jax.vjp(losses_of, state.params, state.extras, has_aux=True)
    ones, none = (jax.tree.map(fill, losses) for fill in (jnp.ones_like, jnp.zeros_like))
    chosen = {name: none | {name: ones[name]} for name in losses} if by_component else {"loss": ones}
    gradients = {name: in_place(spec, pull_back(weights)) for name, weights in chosen.items()}
    return gradients, (total(losses), metrics)


def piece_losses(
    spec: UpdateSpec,
    state: TrainState,
    base: Any,
    batch: Batch,
    params: Any,
    extras: Any,
    index: jax.Array,
    piece: tuple[Batch, Views],
    constants: Any,
) -> tuple[dict, dict]:
    """Returns the components of one micro-batch's loss, summed over rows, and the metrics of its rows."""
    key = dropout_key(spec, state, index)
    new, reads = score(spec, base, params, extras, *piece, dropout_key=key, extra=("entropy_value",))
    losses, metrics = spec.method.objective(new, constants)
    if state.kl_scale is not None:
        losses |= {"kl": state.kl_scale * losses["kl"]}
    # The entropy counts only predicted tokens, not those that a view shows or that a step does not commit.
    counted = piece[1].predicted() * piece[0].completion_mask
    metrics |= {"entropy_total": jnp.sum(reads["entropy_value"] * counted, axis=(0, 2))}
    metrics |= {"hidden_total": jnp.sum(counted, axis=(0, 2))}
    return {name: jnp.sum(value) for name, value in losses.items()}, metrics


def summaries(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Summarises metrics over the rows of a batch.

    Names that end in `_max` give the maximum, names that end in `_std` the standard deviation, all others the mean.

    Args:
      metrics: `[micro-batches, rows]` each; "entropy_total" and "hidden_total" become "entropy", per hidden token.
    """
    of = {"max": jnp.max, "std": jnp.std}
    found = {name: of.get(name.rpartition("_")[2], jnp.mean)(value) for name, value in metrics.items()}
    per_token = found.pop("entropy_total") / jnp.maximum(found.pop("hidden_total"), jnp.finfo(jnp.float32).tiny)
    return found | {"entropy": per_token}


def signal_to_noise(norm: jax.Array, square_sum: jax.Array, pieces: int) -> jax.Array:
    """Estimates the squared norm of the expected gradient, divided by the variance of its estimate.

    The squared norm of a mean of independent pieces exceeds that of its expectation by its variance, which is therefore
    subtracted. For pure noise the result is 0 on average, and negative about half of the time.

    Args:
      norm: norm of the sum of the micro-batches' gradients.
      square_sum: sum of their squared norms.
      pieces: number of micro-batches.
    """
    mean_square = (norm / pieces) ** 2
    variance = (square_sum / pieces - mean_square) * pieces / (pieces - 1)
    noise = variance / pieces
    return (mean_square - noise) / jnp.maximum(noise, jnp.finfo(jnp.float32).tiny)


# ------------------------------------------------------------------------------------------------------ arrangement


def in_place(spec: UpdateSpec, gradients: tuple[Any, Any]) -> tuple[Any, Any]:
    """Places the gradients in the parameters and in the extras as these are placed."""
    gradient, of_extras = gradients
    placed = jax.tree.map(constrain, gradient, parameter_axes(spec.config, gradient))
    return placed, jax.tree.map(replicate, of_extras)


def total(parts: dict[str, Any]) -> Any:
    """Returns the sum of pytrees with the same structure."""
    return jax.tree.map(lambda *values: sum(values), *parts.values())
