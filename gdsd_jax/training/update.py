"""One inner update: draw views, score old policy and reference, accumulate the gradient over micro-batches.

All of it is one compiled program. Old, reference and new policy see the same views in micro-batches of the same shape,
because a log-ratio of 4e-4 nats summed over a completion drowns in the rounding of any other arrangement.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gdsd_jax.denoiser import DenoiserConfig
from gdsd_jax.diffusion.scoring import Views, read_views
from gdsd_jax.methods import Batch, Method, Scores
from gdsd_jax.runtime.sharding import constrain
from gdsd_jax.training.state import TrainState, parameter_axes, policy

# Folded into the run's key with the count of updates or iterations, so that every draw has a stream of its own.
ROLLOUT_STREAM, MASK_STREAM, DROPOUT_STREAM, OLD_MASK_STREAM = range(4)


def stream_key(key: jax.Array, stream: int, count: jax.Array) -> jax.Array:
    """The key of one draw of a run."""
    return jax.random.fold_in(jax.random.fold_in(key, stream), count)


def whole(x: jax.Array) -> jax.Array:
    """A small array on every device, on its way to another cut: each micro-batch lies over all devices, as rows do."""
    return constrain(x, ["tokens"] * x.ndim)


def micro_batches(tree: Any, rows: int, axis: int = 0) -> Any:
    """Every array of a pytree as `B / rows` micro-batches of consecutive rows, in front of its other axes.

    Args:
      axis: of the rows.
    """

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(whole(x), axis, 0).reshape(-1, rows, *x.shape[:axis], *x.shape[axis + 1 :])
        x = constrain(x, ("micro_batches", "rows", *["tokens"] * (x.ndim - 2)))
        return jnp.moveaxis(x, 1, 1 + axis)

    return jax.tree.map(cut, tree)


def total(parts: dict[str, Any]) -> Any:
    """The sum of pytrees of one structure."""
    return jax.tree.map(lambda *values: sum(values), *parts.values())


def make_inner_update(
    config: DenoiserConfig,
    method: Method,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    microbatch_rows: int,
    vocab_chunk: int,
    shardings: TrainState | None = None,
) -> Callable[[TrainState, Any, Any, Batch], tuple[TrainState, dict]]:
    """Compiles `update(state, base, old_params, batch, by_component=False) -> (state, metrics)`.

    `old_params` None says that the policy has not moved since the rollout: old is then the stop-gradient of new, and no
    forward is spent on it (unless the method couples rows through the old policy). The state is donated.

    `by_component` (static) adds `grad/NAME`, the gradient norm of each component of the loss. Each beyond the first
    costs a backward pass and memory for one more gradient.

    Args:
      shardings: where the state lies, as `state_shardings` gives it; None leaves it to the compiler.
    """

    def score(
        base: Any,
        params: Any,
        batch: Batch,
        views: Views,
        dropout_key: jax.Array | None = None,
        extra: tuple = (),
    ) -> tuple[Scores, dict]:
        """Scores of one micro-batch, and its reads; `params` None is the reference: the base alone."""
        weights, lora = (base, None) if params is None else policy(base, params)
        reads = read_views(
            config,
            weights,
            lora,
            batch.tokens,
            views,
            method.reads + extra,
            prompt_mask=batch.prompt_mask,
            dropout_key=dropout_key,
            chunk=vocab_chunk,
        )
        return method.score(reads, views), reads

    def views_of(key: jax.Array, batch: Batch) -> tuple[Batch, Views]:
        """Batch and views, drawn with this key, in micro-batches."""
        views = method.views(method.masks(key, batch), batch)
        return micro_batches(batch, microbatch_rows), micro_batches(views, microbatch_rows, axis=1)

    @functools.partial(
        jax.jit, donate_argnums=0, static_argnames="by_component", out_shardings=(shardings, None)
    )
    def update(
        state: TrainState, base: Any, old_params: Any, batch: Batch, by_component: bool = False
    ) -> tuple[TrainState, dict]:
        rows = batch.tokens.shape[0]
        steps = rows // microbatch_rows
        with jax.named_scope("views"):
            pieces = views_of(stream_key(state.key, MASK_STREAM, state.updates), batch)

        def score_all(params: Any, pieces: tuple = pieces) -> Scores:
            scores = jax.lax.map(lambda piece: score(base, params, *piece)[0], pieces)
            return jax.tree.map(lambda x: whole(x).reshape(rows, *x.shape[2:]), scores)

        with jax.named_scope("old_and_reference"):
            old = None
            before = state.params if old_params is None else old_params
            if method.old == "own_masks":
                old = score_all(before, views_of(stream_key(state.key, OLD_MASK_STREAM, state.iteration), batch))
            elif method.old == "always" or (method.old == "ratio" and old_params is not None):
                old = score_all(before)
            ref = score_all(None) if method.needs_reference else None
            current = score_all(state.params) if method.current else None
        constants = method.constants(batch, old, ref, current)

        def losses_of(params: Any, index: jax.Array, piece: tuple, constants: Any) -> tuple[dict, dict]:
            key = jax.random.fold_in(stream_key(state.key, DROPOUT_STREAM, state.updates), index * microbatch_rows)
            new, reads = score(base, params, *piece, key, ("entropy_value",))
            losses, metrics = method.objective(new, constants)
            entropy = jnp.mean(reads["entropy_value"], axis=0)
            metrics = {name: jnp.sum(value) / rows for name, value in metrics.items()}
            metrics["entropy"] = jnp.sum(entropy * piece[0].completion_mask) / jnp.sum(batch.completion_mask)
            return {name: jnp.sum(value) for name, value in losses.items()}, metrics

        def gradients_of(inputs: tuple) -> tuple[dict, tuple]:
            """Gradients of one micro-batch: of each component, or of their sum alone; and the loss and metrics."""
            losses, pull_back, metrics = jax.vjp(lambda params: losses_of(params, *inputs), state.params, has_aux=True)
            ones, none = (jax.tree.map(fill, losses) for fill in (jnp.ones_like, jnp.zeros_like))
            chosen = {name: none | {name: ones[name]} for name in losses} if by_component else {"loss": ones}
            return {name: in_place(pull_back(weights)[0]) for name, weights in chosen.items()}, (total(losses), metrics)

        def in_place(gradient: Any) -> Any:
            return jax.tree.map(constrain, gradient, parameter_axes(config, gradient))

        def accumulate(carry: tuple, inputs: tuple) -> tuple[tuple, tuple]:
            gradients, square = carry
            pieces, reported = gradients_of(inputs)
            square = square + optax.tree.norm(total(pieces)) ** 2
            return (jax.tree.map(jnp.add, gradients, pieces), square), reported

        with jax.named_scope("gradient"):
            inputs = jnp.arange(steps), pieces, micro_batches(constants, microbatch_rows)
            shapes, _ = jax.eval_shape(gradients_of, jax.tree.map(lambda x: x[0], inputs))
            start = ({name: in_place(zero) for name, zero in optax.tree.zeros_like(shapes).items()}, jnp.zeros(()))
            (gradients, square), (losses, metrics) = jax.lax.scan(accumulate, start, inputs)
            gradient = total(gradients)
        with jax.named_scope("optimizer"):
            changes, opt_state = optimizer.update(gradient, state.opt_state, state.params)
            params = optax.apply_updates(state.params, changes)
        norm = optax.tree.norm(gradient)
        report = {f"policy/{name}": jnp.sum(value) for name, value in metrics.items()}
        report |= {"loss": jnp.sum(losses), "grad/norm": norm, "lr": jnp.asarray(schedule(state.updates))}
        report["update/norm"] = optax.tree.norm(changes)
        if by_component:
            report |= {f"grad/{name}": optax.tree.norm(part) for name, part in gradients.items()}
        if steps > 1:
            report["grad/signal_to_noise"] = signal_to_noise(norm, square, steps)
        state = state.replace(params=params, opt_state=opt_state, updates=state.updates + 1)
        return state, report

    return update


def signal_to_noise(norm: jax.Array, square_sum: jax.Array, pieces: int) -> jax.Array:
    """Squared norm of the expected gradient over the variance of its estimate, from micro-batch gradients.

    The squared norm of a mean of noise is its variance, so that much is taken off: pure noise gives 0 on average.

    Args:
      norm: norm of the sum of the pieces.
      square_sum: sum of the pieces' squared norms.
      pieces: number of micro-batches.
    """
    mean_square = (norm / pieces) ** 2
    variance = (square_sum / pieces - mean_square) * pieces / (pieces - 1)
    noise = variance / pieces
    return jnp.maximum(mean_square - noise, 0.0) / jnp.maximum(noise, jnp.finfo(jnp.float32).tiny)
