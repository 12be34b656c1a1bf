r"""Computes the probability that a step of the sampler commits given tokens at given positions.

A step draws a candidate `c_j ~ q_j` for each masked position j, all independent (`q` includes the temperature, the cuts
and the bans), ranks the candidates by a score `s_j(c_j)` and commits the first ones. The candidates that are not
committed leave no trace, so each of them is summed out:

    P(U, y_U) = prod_{k in U} q_k(y_k)  prod_{j in E \ U} F_j,    F_j = sum_v q_j(v) [v at j ranks behind the last of U]

over the eligible positions E and the committed ones U; of equal scores the left one ranks first. With a threshold or a
factor, `F_j` is the mass of the candidates that do not pass it and rank behind the best of U. If noise decides the
ranks, they follow from a race: candidate v at j arrives after an exponential time of rate `w = exp(s / alg_temp)` (1 if
the order is uniform). All of U must arrive before the others, which is an integral over the time when the last of U
arrives:

    int dt  d/dt prod_U (1 - e^{-w_k t})  prod_{E \ U} sum_v q_j(v) e^{-w_j(v) t}.

Gradients flow through `q` and `w`. Ranks are piecewise constant in the logits and have no gradient.

S positions of the step's region, V vocabulary, v tokens of a chunk of it, N nodes of an integral. A walk is a function
`walk(step, start)` that folds `step(carry, logits [..., S, v], ids [v])` over chunks of the vocabulary and returns the
last carry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from gdsd_jax.diffusion.proposals import top_p_cut
from gdsd_jax.diffusion.race import nodes, race, summed_survival, time
from gdsd_jax.diffusion.remasking import LOWEST, STRATEGIES, SamplerConfig

# The logit of a token that is never drawn. It is finite so that a chunk of only such tokens has a finite gradient.
NEVER = -1e30
Walk = Callable
fixed = lax.stop_gradient


class Proposal(NamedTuple):
    """Describes the distributions that candidates are drawn from; every array is `[..., S]` unless a shape is given.

    plain: the log-normaliser of the logits.
    normaliser: the log-normaliser of logits / temperature, over the tokens that the cuts keep.
    cut: tokens whose logit / temperature lies below this value are cut.
    logit: the logit of the target.
    best: `[..., S, 2]`, the two largest values of logits / temperature.
    """

    plain: Array
    normaliser: Array
    cut: Array
    logit: Array
    best: Array


def proposal(walk: Walk, target: Array, settings: SamplerConfig, vocab_size: int, dtype: Any) -> Proposal:
    """Computes the distributions of the candidates, and the logits of `target` [..., S]."""
    heat = settings.temperature
    top_k = settings.top_k if settings.top_k is not None and settings.top_k < vocab_size else None
    count = min(max(2, (top_k or 0) + 1), vocab_size)
    low = jnp.full(target.shape, NEVER, dtype)

    def step(carry: tuple, z: Array, ids: Array) -> tuple:
        plain, scaled, logit, best = carry
        plain = jnp.logaddexp(plain, jax.nn.logsumexp(z, axis=-1))
        scaled = plain if heat == 1 else jnp.logaddexp(scaled, jax.nn.logsumexp(z / heat, axis=-1))
        logit = logit + jnp.sum(jnp.where(ids == target[..., None], z, 0), axis=-1)
        most = lax.top_k(z, min(count, z.shape[-1]))[0]
        return plain, scaled, logit, lax.top_k(jnp.concatenate([best, most], axis=-1), count)[0]

    start = low, low, jnp.zeros_like(low), jnp.full((*target.shape, count), NEVER, dtype)
    plain, scaled, logit, best = walk(step, start)
    best = best / heat
    cut = jnp.full(target.shape, -jnp.inf, dtype)
    if settings.top_p is not None and settings.top_p < 1:
        cut = _cut_of_top_p(walk, fixed(scaled), fixed(best[..., 0]), settings)
    if top_k is not None:
        # The cut lies halfway between the last token kept and the first one cut, so that rounding moves neither across.
        cut = jnp.maximum(cut, fixed(best[..., top_k - 1] + best[..., top_k]) / 2)
    normaliser = scaled
    if top_k is not None or (settings.top_p or 1) < 1:
        keep = lambda z: jnp.where(z / heat >= cut[..., None], z / heat, NEVER)  # noqa: E731
        normaliser = walk(lambda sofar, z, _: jnp.logaddexp(sofar, jax.nn.logsumexp(keep(z), axis=-1)), low)
    return Proposal(plain, normaliser, cut, logit, best[..., :2])


def _cut_of_top_p(walk: Walk, normaliser: Array, best: Array, settings: SamplerConfig) -> Array:
    """Returns the cut of `proposals.keep_top_p` as a value of logit / temperature.

    It corresponds to the probability halfway between those of the last token kept and of the first one cut.
    """

    def bits(z: Array) -> tuple[Array, Array]:
        probs = jnp.exp(fixed(z) / settings.temperature - normaliser[..., None]).astype(jnp.float32)
        return probs, lax.bitcast_convert_type(probs, jnp.int32)

    def mass_above(middle: Array) -> Array:
        def step(mass: Array, z: Array, _: Array) -> Array:
            probs, b = bits(z)
            return mass + jnp.sum(jnp.where(b > middle[..., None], probs, 0), axis=-1)

        return walk(step, jnp.zeros(normaliser.shape, jnp.float32))

    highest = lax.bitcast_convert_type(jnp.exp(best - normaliser).astype(jnp.float32), jnp.int32)
    last = top_p_cut(mass_above, highest, settings.top_p)

    def below(most: Array, z: Array, _: Array) -> Array:
        probs, b = bits(z)
        return jnp.maximum(most, jnp.max(jnp.where(b < last[..., None], probs, 0), axis=-1))

    first_cut = walk(below, jnp.zeros(normaliser.shape, jnp.float32))
    between = (lax.bitcast_convert_type(last, jnp.float32) + first_cut) / 2
    return jnp.log(between.astype(normaliser.dtype)) + normaliser


def drawn_log_prob(found: Proposal, settings: SamplerConfig) -> Array:
    """Returns `log q(y)`, `[..., S]`, of the targets; it is -inf where the cuts or a ban exclude the target."""
    scaled = found.logit / settings.temperature
    return jnp.where((scaled >= found.cut) & (found.logit > NEVER / 2), scaled - found.normaliser, -jnp.inf)


class Bound(NamedTuple):
    """A rank: a score and, to order equal scores, a position; both are `[..., 1]`."""

    score: Array
    place: Array


def _last(score: Array, chosen: Array) -> Bound:
    """Returns the rank of the last of the chosen candidates; without any, a rank behind which all candidates lie."""
    lowest = jnp.min(jnp.where(chosen, score, jnp.inf), axis=-1, keepdims=True)
    place = jnp.arange(score.shape[-1])
    return Bound(lowest, jnp.max(jnp.where(chosen & (score == lowest), place, -1), axis=-1, keepdims=True))


def _first(score: Array, chosen: Array) -> Bound:
    """Returns the rank of the first of the chosen candidates; without any, a rank behind which none lies."""
    highest = jnp.max(jnp.where(chosen, score, -jnp.inf), axis=-1, keepdims=True)
    place, end = jnp.arange(score.shape[-1]), score.shape[-1]
    return Bound(highest, jnp.min(jnp.where(chosen & (score == highest), place, end), axis=-1, keepdims=True))


def _behind(score: Array, bound: Bound) -> Array:
    """Returns which candidates, `[..., S]` or `[..., S, v]`, rank behind a bound."""
    place = jnp.arange(score.shape[bound.score.ndim - 1])
    if score.ndim > bound.score.ndim:
        bound, place = Bound(*(x[..., None] for x in bound)), place[:, None]
    return (score < bound.score) | ((score == bound.score) & (place > bound.place))


class Rule(NamedTuple):
    """Holds the conditions that a threshold or a factor imposes on the candidates of a step.

    possible: `[...]`, whether one step can commit the committed candidates together.
    lead: `[..., S]`, which of the committed candidates may rank first.
    open: a function from confidences `[..., S, v]` to whether the step may leave each candidate uncommitted.
    """

    possible: Array
    lead: Array
    open: Callable[[Array], Array]


def _rule(settings: SamplerConfig, confidence: Array, committed: Array) -> Rule:
    """Returns the rule of the settings, given the candidates that the step commits.

    At most one committed candidate may fail the threshold or factor. It must then rank first, because the first
    candidate is always committed.
    """
    number = lambda chosen: jnp.sum(chosen, axis=-1, keepdims=True)  # noqa: E731
    if settings.threshold is not None:
        passing = committed & (confidence >= settings.threshold)
        fits, unbound = jnp.ones_like(number(passing), bool), lambda c: c < settings.threshold
    else:
        end = _last(confidence, committed)
        is_last = committed & ~_behind(confidence, end) & (confidence == end.score)
        is_last &= jnp.arange(committed.shape[-1]) == end.place
        # As in `remasking.select`, the n-th most confident candidate passes if (n + 1)(1 - c) < factor.
        whole = (number(committed) + 1) * (1 - end.score) < settings.factor
        passing = committed & (whole | ~is_last)
        n, end = number(passing), _last(confidence, passing)
        fits = (n == 0) | ((n + 1) * (1 - end.score) < settings.factor)
        unbound = lambda c: _behind(c, end) & ((n + 2)[..., None] * (1 - c) >= settings.factor)  # noqa: E731
    failing = committed & ~passing
    lead = jnp.where(jnp.any(failing, axis=-1, keepdims=True), failing, committed)
    return Rule((fits & (number(failing) <= 1))[..., 0], lead, unbound)


def step_log_prob(
    walk: Walk, target: Array, committed: Array, eligible: Array, settings: SamplerConfig, vocab_size: int, dtype: Any
) -> tuple[Array, Proposal]:
    """Computes the log-probability of what a step commits, given how many tokens it commits.

    The step commits `target` [..., S] at the positions `committed`, out of the positions `eligible`.

    Returns:
      The terms of the log-probability, `[..., S]`, to be summed over positions, and the distributions of the
      candidates. The term for the order of the commits is part of the first committed position's; positions that are
      not eligible have the term 0.
    """
    strategy = STRATEGIES[settings.strategy]
    found = proposal(walk, target, settings, vocab_size, dtype)
    drawn = jnp.where(committed, drawn_log_prob(found, settings), 0.0)
    early = settings.threshold is not None or settings.factor is not None
    if strategy.independent and not early:
        return drawn, found
    rest = eligible & ~committed
    postponed = jnp.asarray(settings.suppress_confidence, jnp.int32)
    held = jnp.isin(target, postponed)
    score = _scorer(walk, found, settings)
    confidence = jnp.exp(found.logit - found.plain)
    mine = score(jnp.exp(drawn), confidence)
    confidence = fixed(jnp.where(held, LOWEST, confidence))
    possible, lead, unbound = jnp.ones(target.shape[:-1], bool), committed, None
    if early:
        possible, lead, unbound = _rule(settings, confidence, committed)

    def candidates(z: Array, ids: Array) -> tuple[Array, Array, Array, Array]:
        """Returns each candidate's probability and score, and whether it may stay uncommitted, and is postponed."""
        scaled = z / settings.temperature
        q = jnp.where(scaled >= found.cut[..., None], jnp.exp(scaled - found.normaliser[..., None]), 0.0)
        c = jnp.exp(fixed(z) - fixed(found.plain)[..., None])
        s, late = score(q, c), jnp.broadcast_to(jnp.isin(ids, postponed), z.shape)
        c = jnp.where(late, LOWEST, c)
        return q, s, jnp.ones_like(late) if unbound is None else unbound(c), late

    def masses(rank: Callable[[Array, Array], Array]) -> tuple[Array, Array, Array]:
        """Returns three masses of candidates, which add up to 1.

        The first two are the masses of candidates that may stay uncommitted and for which `rank(score, postponed)` is
        True: first those that are not postponed, then those that are. The third is the mass of all other candidates.
        """

        def step(sums: tuple, z: Array, ids: Array) -> tuple:
            q, s, stays, late = candidates(z, ids)
            kinds = stays & rank(fixed(s), late)
            parts = kinds & ~late, kinds & late, ~kinds
            parts = (jnp.sum(jnp.where(part, q, 0), axis=-1) for part in parts)
            return tuple(sofar + part for sofar, part in zip(sums, parts, strict=True))

        return walk(step, (jnp.zeros(target.shape, dtype),) * 3)

    first = jnp.arange(target.shape[-1]) == jnp.argmax(committed, axis=-1)[..., None]
    at_first = lambda x: jnp.where(first & committed, x[..., None], 0.0)  # noqa: E731
    certain = at_first(jnp.where(possible, 0.0, -jnp.inf))

    if settings.alg_temp == 0 and not strategy.uniform:
        mine = fixed(jnp.where(held, LOWEST, mine))
        bound = _first(mine, committed) if early else _last(mine, committed)
        free, late, out = masses(lambda s, late: _behind(jnp.where(late, LOWEST, s), bound))
        if early:
            is_first = committed & (mine == bound.score) & (jnp.arange(mine.shape[-1]) == bound.place)
            certain += at_first(jnp.where(jnp.any(is_first & lead, axis=-1), 0.0, -jnp.inf))
        return drawn + certain + jnp.where(rest, _log(free + late, out), 0.0), found

    free, late, out = masses(lambda s, late: jnp.ones_like(late))
    n, m = jnp.sum(committed, axis=-1), jnp.sum(rest, axis=-1)
    if strategy.uniform and not settings.suppress_confidence:
        own = jnp.where(rest, _log(free, out), 0.0)
        if early:
            order = jnp.log(jnp.maximum(jnp.sum(lead, axis=-1), 1)) - jnp.log(jnp.maximum(n + m, 1))
        else:
            order = lax.lgamma(n + 1.0) + lax.lgamma(m + 1.0) - lax.lgamma(n + m + 1.0)
        return drawn + certain + own + at_first(order.astype(dtype)), found

    # Noise decides the ranks. Postponed candidates never arrive in the race: they are committed from the left once
    # nothing else is left.
    rate = mine / settings.alg_temp if settings.alg_temp else jnp.zeros_like(drawn)
    most = fixed(rate)
    if settings.strategy == "maskgit_plus":
        most = fixed(jnp.exp(found.best[..., 0] - found.normaliser)) / settings.alg_temp
    runs = committed & ~held
    log_t = nodes(rate, most, runs, eligible, settings, vocab_size)
    if settings.strategy == "maskgit_plus":
        survival = summed_survival(walk, candidates, log_t, settings, target.shape, dtype)
        log_survival = jnp.log(jnp.maximum(survival, jnp.finfo(dtype).tiny))
    else:
        # Where there is no mass, the logarithms are finite for the sake of the gradient; `certain` adds the -inf.
        log_free, log_late = _log(free, late + out, NEVER), _log(late, free + out, NEVER)
        log_survival = jnp.logaddexp(log_free[..., None] - time(rate, log_t), log_late[..., None])
    certain += jnp.where(rest & (free + late == 0), -jnp.inf, 0.0)
    order = race(rate, log_t, runs, lead & ~held, rest, log_survival, early)
    order = jnp.where(jnp.any(runs, axis=-1) & (jnp.any(rest, axis=-1) | early), order, 0.0)
    some_held = jnp.any(committed & held, axis=-1, keepdims=True)
    end = jnp.max(jnp.where(committed & held, jnp.arange(target.shape[-1]), -1), axis=-1, keepdims=True)
    behind = jnp.where(jnp.arange(target.shape[-1]) > end, _log(late, free + out), -jnp.inf)
    own = jnp.where(rest & some_held, behind, 0.0)
    certain += at_first(jnp.where(~some_held[..., 0] | ~jnp.array(early) | (n == 1), 0.0, -jnp.inf))
    return drawn + certain + own + at_first(jnp.where(some_held[..., 0], 0.0, order)), found


def _log(mass: Array, rest: Array, of_nothing: float = -jnp.inf) -> Array:
    """Returns `log mass`, with `mass + rest = 1`, computed from `rest` where the mass is near 1.

    Where the mass is 0, the result is `of_nothing` and has no gradient.
    """
    near = rest < 0.5
    small = jnp.where(mass > 0, jnp.log(jnp.where(mass > 0, mass, 1.0)), of_nothing)
    return jnp.where(near, jnp.log1p(-jnp.where(near, rest, 0.0)), small)


def _scorer(walk: Walk, found: Proposal, settings: SamplerConfig) -> Callable[[Array, Array], Array]:
    """Returns the function `(q, confidence) -> score` of candidates, which are `[..., S]` or `[..., S, v]`."""
    leftmost = STRATEGIES[settings.strategy].leftmost
    if not leftmost and settings.strategy not in ("topk_margin", "entropy"):
        return (lambda q, c: q) if settings.strategy == "maskgit_plus" else (lambda q, c: c)
    keep = lambda z: jnp.where(z >= found.cut[..., None], jnp.exp(z - found.normaliser[..., None]), 0.0)  # noqa: E731
    if leftmost:
        value = jnp.broadcast_to(-jnp.arange(found.plain.shape[-1], dtype=found.plain.dtype), found.plain.shape)
    elif settings.strategy == "topk_margin":
        two = keep(found.best)
        value = two[..., 0] - two[..., 1]
    else:

        def step(total: Array, z: Array, _: Array) -> Array:
            q = keep(z / settings.temperature)
            return total + jnp.sum(q * jnp.log(q + 1e-10), axis=-1)

        value = walk(step, jnp.zeros_like(found.plain))
    return lambda q, c: value if q.ndim == value.ndim else jnp.broadcast_to(value[..., None], q.shape)
