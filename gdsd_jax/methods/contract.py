"""Checks a method against the contract of `gdsd_jax.methods.method`, on shapes alone: nothing is computed.

B rows, G completions per group, K passes, L completion tokens, M views, P prompt tokens, R reads per token, T = P + L
tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gdsd_jax.denoiser import DenoiserConfig
from gdsd_jax.diffusion import SamplerConfig
from gdsd_jax.diffusion.scoring import Views
from gdsd_jax.methods.method import Batch, Method, Scores
from gdsd_jax.runtime.errors import UserError

READS = ("log_prob", "centred", "entropy", ("centred_top_k", "k"), "hidden", "step_log_prob", "proposal_log_prob")
OLD = ("unused", "ratio", "always", "own_masks")

# The shapes are traced before the real denoiser is known; the contract does not depend on its sizes.
ANY_DENOISER = DenoiserConfig(
    family="", vocab_size=32, hidden_size=24, num_layers=1, num_heads=2, num_kv_heads=2, intermediate_size=16,
    max_length=64, rope_theta=1e4, rms_norm_eps=1e-5, qkv_bias=False, tied_head=False, next_token_logits=False,
    mask_token_id=3, eos_token_id=1, pad_token_id=0,
)  # fmt: skip


def check(
    method: Method,
    *,
    name: str,
    prompt_length: int,
    completion_length: int,
    group_size: int,
    sampler: SamplerConfig | None = None,
    component_weights: tuple[tuple[str, float], ...] = (("reward", 1.0),),
    token_rewards: bool = False,
    verdict_names: tuple[str, ...] = ("right",),
    reference: bool = False,
    kl: bool = False,
) -> None:
    """Traces masks, views, score, prepare and objective on a batch of two groups, without computing anything.

    Args:
      method: the result of `build`.
      name: the method's name, for error messages.
      prompt_length, completion_length, group_size: P, L and G of the run.
      sampler: settings of the rollouts; None means one token per step, without blocks.
      component_weights: name and weight of each reward component of the run's task.
      token_rewards: whether the run's task rewards tokens.
      verdict_names: the names of the verdicts that the run's task gives.
      reference: whether the run has a reference that moves.
      kl: whether the run adapts the weight of the KL.

    Raises:
      UserError: a function does not accept its arguments, or does not return the shapes of the contract.
    """
    require_known(method, name)
    rows, completion = 2 * group_size, (2 * group_size, completion_length)
    batch = Batch(
        tokens=_array((rows, prompt_length + completion_length), jnp.int32),
        prompt_mask=_array((rows, prompt_length), bool),
        completion_mask=_array(completion),
        rewards=_array((rows,)),
        commit_step=_array(completion, jnp.int32),
        confidence=_array(completion),
        log_prob=_array(completion) if method.records else None,
        entropy=_array(completion) if method.records else None,
        components=_array((rows, len(component_weights))),
        token_rewards=_array(completion) if token_rewards else None,
        verdicts=_array((rows, len(verdict_names))) if method.verdicts else None,
        verdict_names=verdict_names if method.verdicts else (),
        iteration=_array((), jnp.int32),
        inner_update=_array((), jnp.int32),
        component_weights=component_weights,
        group_size=group_size,
        sampler=sampler or one_by_one(completion_length),
    )
    trace = Trace(name, rows)
    scores = traced_scores(trace, method, traced_views(trace, method, batch))
    losses, metrics = traced_losses(trace, method, batch, scores)
    if reference and not method.needs_reference:
        raise UserError(f"method {name!r} uses no reference: set config.reference.every to 0, or its beta above 0")
    if kl and not ("kl" in losses and "kl" in metrics):
        raise UserError(
            f"method {name!r} has no KL in its loss to adapt: set config.reference.kl_target to None, "
            "or its beta above 0"
        )


def require_known(method: Method, name: str) -> None:
    """Raises UserError unless `method` is a `Method` whose `reads` and `old` are among the known ones."""
    if not isinstance(method, Method):
        kind = type(method).__name__
        raise UserError(f"method {name!r}: make(settings) must return a gdsd_jax.methods.Method, not {kind}")
    for read in method.reads:
        known = read in READS or (isinstance(read, tuple) and len(read) == 2 and read[0] == "centred_top_k")
        if not known:
            raise UserError(f"method {name!r}: unknown read {read!r}, reads are {READS}")
    if method.old not in OLD:
        raise UserError(f"method {name!r}: old is {method.old!r}, not one of {', '.join(OLD)}")


class Trace:
    """Runs functions of the method `name` on shapes with B = `rows`; errors name the method and the function."""

    def __init__(self, name: str, rows: int) -> None:
        self.name, self.rows = name, rows

    def run(self, function: str, takes: str, call: Callable, *arguments: Any) -> Any:
        """Returns the shapes of what `call` returns; `function` and the arguments that it `takes` are for messages."""
        try:
            return jax.eval_shape(call, *arguments)
        except UserError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise UserError(f"method {self.name!r}: {function}{takes} failed with {reason}") from error

    def expect(self, condition: bool, function: str, expected: str, found: Any) -> None:
        """Raises UserError, which says what was expected and what was found, unless the condition holds."""
        if not condition:
            raise UserError(f"method {self.name!r}: {function} must return {expected}, it returned {_shapes(found)}")

    def expect_rows_first(self, function: str, found: Any, kind: str) -> None:
        """Raises UserError unless the first axis of every array has the rows of the batch."""
        good = all(leaf.ndim >= 1 and leaf.shape[0] == self.rows for leaf in jax.tree.leaves(found))
        self.expect(good, function, f"{kind} whose arrays all have the {self.rows} rows first", found)


def traced_views(trace: Trace, method: Method, batch: Batch) -> Views:
    """Returns the shapes of the method's views of the batch."""
    rows, total = batch.tokens.shape
    length = batch.completion_length
    masked = trace.run("masks", "(key, batch)", method.masks, _key(), batch)
    good = hasattr(masked, "shape") and masked.shape[1:] == (rows, total) and masked.dtype == bool
    trace.expect(good, "masks", f"bool [M, {rows}, {total}]", masked)

    views = trace.run("views", "(masked, batch)", method.views, masked, batch)
    trace.expect(isinstance(views, Views), "views", "a gdsd_jax.diffusion.scoring.Views", views)
    good = views.masked.shape[1:] == (rows, total) and views.weights.shape[1:] == (rows, length)
    trace.expect(good, "views", f"masked [K, {rows}, {total}] and weights [R, {rows}, {length}]", views)
    good = len(views.sources) == views.weights.shape[0] and max(map(max, views.sources)) < views.masked.shape[0]
    passes = f"one source for each read, made of passes below {views.masked.shape[0]}"
    trace.expect(good, "views", passes, views.sources)
    return views


def traced_scores(trace: Trace, method: Method, views: Views) -> Scores:
    """Returns the shapes of the method's scores of the views."""

    # The reads are a list, because JAX sorts the keys of dictionaries, and strings cannot be compared with tuples.
    def score(values: list, views: Views, *extras: Any) -> Scores:
        return method.score(dict(zip(method.reads, values, strict=True)), views, *extras)

    width = {"hidden": (ANY_DENOISER.hidden_size,)}
    reads = [_array((*views.weights.shape, *width.get(read, ()))) for read in method.reads]
    takes, extras = "(reads, views)", []
    if method.extras is not None:
        takes = "(reads, views, extras)"
        make = lambda key: method.extras(key, ANY_DENOISER)  # noqa: E731
        extras = [trace.run("extras", "(key, denoiser config)", make, _key())]
    scores = trace.run("score", takes, score, reads, views, *extras)
    trace.expect(hasattr(scores, "guided"), "score", "a gdsd_jax.methods.Scores", scores)
    trace.expect_rows_first("score", scores, "Scores")
    return scores


def traced_losses(trace: Trace, method: Method, batch: Batch, scores: Scores) -> tuple[dict, dict]:
    """Returns the shapes of the components of the loss, and of the metrics."""
    # At a first inner update the trainer gives no old scores, unless the method always needs them.
    olds: list[Scores | None] = [] if method.old in ("always", "own_masks") else [None]
    olds += [] if method.old == "unused" else [scores]
    ref, current = scores if method.needs_reference else None, [scores] if method.current else []
    takes = "(batch, old, ref, current)" if method.current else "(batch, old, ref)"
    for old in olds:
        constants = trace.run("prepare", takes, method.prepare, batch, old, ref, *current)
        trace.expect_rows_first("prepare", constants, "constants")
        returned = trace.run("objective", "(new, constants)", method.objective, scores, constants)
        pair = isinstance(returned, tuple) and len(returned) == 2 and all(isinstance(x, dict) for x in returned)
        dictionaries = "({component of the loss: value}, {metric: value})"
        trace.expect(pair and bool(returned[0]), "objective", dictionaries, returned)
        for name, value in [*returned[0].items(), *returned[1].items()]:
            good = getattr(value, "shape", None) == (trace.rows,)
            trace.expect(good, "objective", f"one value per row, [{trace.rows}], as {name!r}", value)
        for name, value in returned[0].items():
            # Integers have no gradient, and only half of a complex number's would be used.
            good = jnp.issubdtype(value.dtype, jnp.floating)
            trace.expect(good, "objective", f"floating-point values as {name!r}, a component of the loss", value)
    return returned


def one_by_one(completion_length: int) -> SamplerConfig:
    """Returns the simplest sampler: each step commits the most confident token, at temperature 1, without blocks."""
    return SamplerConfig(completion_length, completion_length, completion_length, "low_confidence", temperature=1.0)


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def _array(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _shapes(found: Any) -> str:
    """Describes a pytree in one line, with shapes and dtypes in place of arrays."""
    words = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}" if hasattr(x, "shape") else repr(x), found)
    return " ".join(str(words).replace("'", "").split())[:300]
