"""Checks a method's functions against the contract before anything is computed: a dry run on shapes alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gdsd_jax.diffusion import SamplerConfig
from gdsd_jax.diffusion.scoring import Views
from gdsd_jax.errors import UserError
from gdsd_jax.methods.common import Batch, Method

READS = ("log_prob", "centred", "entropy", ("centred_top_k", "k"))
OLD = ("unused", "ratio", "always", "own_masks")


def check(
    method: Method,
    *,
    name: str,
    prompt_length: int,
    completion_length: int,
    group_size: int,
    sampler: SamplerConfig | None = None,
) -> None:
    """Traces masks, views, score, prepare and objective on a batch of two groups, without computing anything.

    Args:
      method: what `build` returned.
      name: how the user calls it; the messages name it.
      prompt_length, completion_length, group_size: P, L and G of the run.
      sampler: of the rollouts; None: one token a step, without blocks.

    Raises:
      UserError: a function that does not take its arguments, or returns another shape than the contract says.
    """
    rows, total = 2 * group_size, prompt_length + completion_length
    completion = (rows, completion_length)

    def run(function: str, expected: str, *arguments: Any) -> Any:
        try:
            return jax.eval_shape(functions[function], *arguments)
        except UserError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise UserError(f"method {name!r}: {function}{expected} failed with {reason}") from error

    def expect(condition: bool, function: str, expected: str, found: Any) -> None:
        if not condition:
            raise UserError(f"method {name!r}: {function} must return {expected}, it returned {_shapes(found)}")

    def rows_first(function: str, found: Any, what: str) -> None:
        whole = all(leaf.ndim >= 1 and leaf.shape[0] == rows for leaf in jax.tree.leaves(found))
        expect(whole, function, f"{what} whose arrays all have the {rows} rows first", found)

    if not isinstance(method, Method):
        kind = type(method).__name__
        raise UserError(f"method {name!r}: make(settings) must return a gdsd_jax.methods.Method, not {kind}")
    for read in method.reads:
        known = read in READS or (isinstance(read, tuple) and len(read) == 2 and read[0] == "centred_top_k")
        if not known:
            raise UserError(f"method {name!r}: unknown read {read!r}, reads are {READS}")
    if method.old not in OLD:
        raise UserError(f"method {name!r}: old is {method.old!r}, not one of {', '.join(OLD)}")

    functions = method._asdict()
    functions["score"] = lambda values, views: method.score(dict(zip(method.reads, values, strict=True)), views)
    batch = Batch(
        tokens=_array((rows, total), jnp.int32),
        prompt_mask=_array((rows, prompt_length), bool),
        completion_mask=_array(completion),
        rewards=_array((rows,)),
        commit_step=_array(completion, jnp.int32),
        confidence=_array(completion),
        log_prob=_array(completion) if method.records else None,
        entropy=_array(completion) if method.records else None,
        group_size=group_size,
        sampler=sampler or one_by_one(completion_length),
    )
    masked = run("masks", "(key, batch)", jax.eval_shape(lambda: jax.random.key(0)), batch)
    good = hasattr(masked, "shape") and masked.shape[1:] == (rows, total) and masked.dtype == bool
    expect(good, "masks", f"bool [M, {rows}, {total}]", masked)

    views = run("views", "(masked, batch)", masked, batch)
    expect(isinstance(views, Views), "views", "a gdsd_jax.diffusion.scoring.Views", views)
    good = views.masked.shape[1:] == (rows, total) and views.weights.shape[1:] == completion
    expect(good, "views", f"masked [K, {rows}, {total}] and weights [R, {rows}, {completion_length}]", views)
    good = len(views.sources) == views.weights.shape[0] and max(map(max, views.sources)) < views.masked.shape[0]
    expect(good, "views", f"one source for each read, made of passes below {views.masked.shape[0]}", views.sources)

    # Not a dictionary: names and tuples do not sort together.
    reads = [_array(views.weights.shape) for _ in method.reads]
    scores = run("score", "(reads, views)", reads, views)
    expect(hasattr(scores, "guided"), "score", "a gdsd_jax.methods.Scores", scores)
    rows_first("score", scores, "Scores")

    # As the trainer calls it: without old scores at a first inner update, unless the method always needs them.
    absent = [] if method.old in ("always", "own_masks") else [None]
    prepare_of = "(batch, old, ref, current)" if method.current else "(batch, old, ref)"
    for old in absent + ([] if method.old == "unused" else [scores]):
        known = (old, scores if method.needs_reference else None, *[scores] * method.current)
        constants = run("prepare", prepare_of, batch, *known)
        rows_first("prepare", constants, "constants")
        returned = run("objective", "(new, constants)", scores, constants)
        pair = isinstance(returned, tuple) and len(returned) == 2 and all(isinstance(x, dict) for x in returned)
        expect(pair and bool(returned[0]), "objective", "({component of the loss: value}, {metric: value})", returned)
        for what, value in [*returned[0].items(), *returned[1].items()]:
            good = getattr(value, "shape", None) == (rows,)
            expect(good, "objective", f"one value per row, [{rows}], as {what!r}", value)


def one_by_one(completion_length: int) -> SamplerConfig:
    """The plainest sampler: the most confident token of each step, at temperature 1, without blocks."""
    return SamplerConfig(completion_length, completion_length, completion_length, "low_confidence", temperature=1.0)


def _array(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _shapes(found: Any) -> str:
    """What a function returned, in words: shapes and dtypes instead of arrays."""
    words = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}" if hasattr(x, "shape") else repr(x), found)
    return " ".join(str(words).replace("'", "").split())[:300]
