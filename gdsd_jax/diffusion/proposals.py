"""Draws the candidates of a step: one token at each position that is read, from the cut distribution of its logits.

B rows, S positions of the step's region, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from gdsd_jax.denoiser import DenoiserConfig, Read, logits_from_hidden
from gdsd_jax.diffusion.remasking import STRATEGIES, SamplerConfig
from gdsd_jax.runtime.sharding import constrain, pieces

# The most logits that a device holds at once, 1 GiB in float32. A larger region is read in slices of positions.
MAX_LOGITS = 2**28
# `propose_at` compiles programs for numbers of positions this far apart at least; a finer choice gains too little.
LEAST = 2
# Tokens in each of the groups into which a draw divides the vocabulary.
GROUP = 128


def keep_top_p(logits: Array, top_p: float) -> Array:
    """Keeps the most probable tokens, up to and including the first one that takes their mass beyond `top_p`.

    A token is kept if the mass of all more probable tokens is at most `top_p`; the other logits become -inf.
    """
    probs = jax.nn.softmax(logits)
    bits = lax.bitcast_convert_type(probs, jnp.int32)
    mass_above = lambda middle: jnp.sum(jnp.where(bits > middle[..., None], probs, 0), axis=-1)  # noqa: E731
    cut = top_p_cut(mass_above, jnp.max(bits, axis=-1), top_p)
    return jnp.where(bits >= cut[..., None], logits, -jnp.inf)


def top_p_cut(mass_above: Callable[[Array], Array], highest: Array, top_p: float) -> Array:
    """Returns the least probability that a cut at mass `top_p` keeps, as the int32 with the bits of that float32.

    Non-negative floats are ordered as their bits are. Bisecting the integers thus finds the cut exactly in 31 passes, a
    fraction of the cost of sorting a large vocabulary.

    Args:
      mass_above: a function from bits to the mass of the tokens whose probabilities have greater bits.
      highest: the bits of the largest probability.
    """

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        too_low, enough = bounds
        middle = too_low + (enough - too_low) // 2
        fits = mass_above(middle) <= top_p
        return jnp.where(fits, too_low, middle), jnp.where(fits, middle, enough)

    return lax.fori_loop(0, 31, halve, (jnp.full_like(highest, -1), highest))[1]


def keep_top_k(logits: Array, top_k: int) -> Array:
    """Keeps the `top_k` largest logits, and those equal to the last of them; the other logits become -inf."""
    cut = lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits >= cut, logits, -jnp.inf)


def _take(values: Array, index: Array) -> Array:
    return jnp.take_along_axis(values, index[..., None], axis=-1)[..., 0]


def _invert(weights: Array, uniform: Array) -> Array:
    """Returns the first index [...] where the cumulative sum of `weights` [..., N] exceeds `uniform` times its total.

    Rounding can make a parallel cumulative sum decrease, or never exceed a target close to the total. Therefore only
    positive weights can be chosen, and the largest weight is chosen if no index qualifies.
    """
    total = jnp.cumsum(weights, axis=-1)
    hit = (total > (uniform * total[..., -1])[..., None]) & (weights > 0)
    return jnp.where(jnp.any(hit, axis=-1), jnp.argmax(hit, axis=-1), jnp.argmax(weights, axis=-1))


class Groups(NamedTuple):
    """Summarises logits [..., V] by groups of GROUP tokens; a draw then reads only the logits of one group.

    peak: [..., G], the highest logit of each group.
    mass: [..., G], the sum of `exp(logit - highest of all)` over each group.
    """

    peak: Array
    mass: Array


def grouped(logits: Float[Array, "*S V"]) -> Groups:
    """Computes the peaks and masses of the G = ceil(V / GROUP) groups; logits of -inf fill up the last group."""
    beyond = [(0, 0)] * (logits.ndim - 1) + [(0, -logits.shape[-1] % GROUP)]
    groups = jnp.pad(logits, beyond, constant_values=-jnp.inf).reshape(*logits.shape[:-1], -1, GROUP)
    peak = jnp.max(groups, axis=-1)
    return Groups(peak, jnp.sum(jnp.exp(groups - jnp.max(peak, axis=-1)[..., None, None]), axis=-1))


def _read(logits: Array, group: Array) -> Array:
    """Reads the logits [..., GROUP] of the given group [...]."""
    place = group[..., None] * GROUP + jnp.arange(GROUP)
    return jnp.take_along_axis(logits, place, axis=-1, mode="fill", fill_value=-jnp.inf)


def best(logits: Float[Array, "*S V"], groups: Groups) -> Int[Array, "*S"]:
    """Returns the token with the highest logit; of equal logits, the first."""
    group = jnp.argmax(groups.peak, axis=-1)
    return (group * GROUP + jnp.argmax(_read(logits, group), axis=-1)).astype(jnp.int32)


def draw(logits: Float[Array, "*S V"], groups: Groups, uniform: Float[Array, "*S 2"]) -> Int[Array, "*S"]:
    """Draws one token from each softmax(logits), by inverting cumulative sums at two uniform numbers in [0, 1).

    This takes two random numbers where the argmax of logits plus Gumbel noise takes V. The first number draws a group,
    the second a token of this group. A single number, which is a multiple of 2^-23, could not reach every token of a
    group with little mass. A token of probability zero is never drawn.
    """
    group = _invert(groups.mass, uniform[..., 0])
    found = _read(logits, group)
    token = _invert(jnp.exp(found - jnp.max(found, axis=-1, keepdims=True)), uniform[..., 1])
    return (group * GROUP + token).astype(jnp.int32)


def candidates(logits: Array, uniform: Array, settings: SamplerConfig) -> tuple[Array, ...]:
    """Chooses one candidate token for each of the distributions `logits` [..., V].

    Args:
      uniform: [..., 2] random numbers in [0, 1).

    Returns:
      The tokens, their probabilities under softmax(logits), and the strategy's scores, each [...]. With
      `settings.record` also the log-probabilities with which the tokens were drawn, and the entropies of
      softmax(logits) in nats.
    """
    strategy = STRATEGIES[settings.strategy]
    cut = logits if settings.temperature in (0, 1) else logits / settings.temperature
    if settings.top_p is not None and settings.top_p < 1:
        cut = keep_top_p(cut, settings.top_p)
    if settings.top_k is not None:
        cut = keep_top_k(cut, settings.top_k)
    groups = grouped(cut)
    token = draw(cut, groups, uniform) if settings.temperature > 0 else best(cut, groups)
    normaliser = jnp.max(groups.peak, axis=-1) + jnp.log(jnp.sum(groups.mass, axis=-1))
    plain = normaliser if cut is logits else jax.nn.logsumexp(logits, axis=-1)
    confidence = jnp.exp(_take(logits, token) - plain)
    if strategy.score is None:
        score = confidence
    else:
        probs = jnp.exp(cut - normaliser[..., None])
        score = strategy.score(probs, _take(probs, token))
    if not settings.record:
        return token, confidence, score
    # At temperature 0 the argmax is taken with certainty, so that its log-probability is 0.
    drawn = _take(cut, token) - normaliser if settings.temperature > 0 else jnp.zeros_like(confidence)
    probs = jnp.exp(logits - plain[..., None])
    entropy = plain - jnp.sum(jnp.where(probs > 0, probs * logits, 0.0), axis=-1)
    return token, confidence, score, drawn, entropy


def banned_tokens(config: DenoiserConfig, settings: SamplerConfig) -> tuple[int, ...]:
    """Returns the ids that are never proposed: suppressed ids, the mask, and ids that the tokenizer does not have."""
    return (*settings.suppress, *[config.mask_token_id] * settings.forbid_mask, *config.padding_tokens)


def ban(logits: Float[Array, "*S V"], tokens: Sequence[int]) -> Float[Array, "*S V"]:
    """Sets the logits of these tokens to -inf."""
    if not tokens:
        return logits
    banned = np.zeros(logits.shape[-1], bool)
    banned[list(tokens)] = True
    # An accelerator would copy the whole array to write a few numbers, but selects for free while it reads. On a CPU
    # writing is faster. The first index is given twice, because XLA turns a write at a single index into a select.
    return lax.platform_dependent(
        logits,
        cpu=lambda logits: logits.at[..., np.array([*tokens, tokens[0]])].set(-jnp.inf, mode="promise_in_bounds"),
        default=lambda logits: jnp.where(banned, -jnp.inf, logits),
    )


class Boost(NamedTuple):
    """One logit in each row that is raised before candidates are chosen.

    place, token: [B] int32, the position in the step's region, and the token.
    amount: [B] float32, the number that is added to this logit.
    """

    place: Array
    token: Array
    amount: Array

    def at(self, place: Array) -> tuple[Array, Array]:
        """Returns the tokens [B, 1], and the amounts [B, S'] added to their logits at the positions `place` [B, S']."""
        return self.token[:, None], self.amount[:, None] * (place == self.place[:, None])


def slices_of(positions: int, at_one_position: int) -> int:
    """Returns into how many slices positions are cut, so that the logits of one are at most `MAX_LOGITS` if possible.

    Args:
      at_one_position: the logits of all rows of one device at one position.
    """
    return next(
        n for n in range(1, positions + 1)
        if positions % n == 0 and (at_one_position * (positions // n) <= MAX_LOGITS or n == positions)
    )  # fmt: skip


def propose(
    config: DenoiserConfig,
    base: dict,
    hidden: Array,
    uniform: Array,
    settings: SamplerConfig,
    raised: tuple[Array, Array] | None = None,
) -> tuple[Array, ...]:
    """Chooses candidates for hidden states; returns what `candidates` returns, each [B, S].

    Args:
      hidden: [1 or 2, B, S, D], the conditional states and, with guidance, the unconditional ones.
      uniform: [B, S, 2] random numbers in [0, 1).
      raised: tokens [B, 1], and the amounts [B, S] that are added to their logits.
    """
    banned = banned_tokens(config, settings)

    def propose_slice(slices: tuple[Array, ...]) -> tuple[Array, ...]:
        hidden, uniform, *amount = slices
        logits = constrain(logits_from_hidden(config, base, hidden), ("views", "rows", "tokens", "vocab"))
        # From here on no sum over the vocabulary crosses devices, so that a draw does not depend on their number.
        logits = constrain(logits, ("views", "rows", "positions", "candidates"))
        if logits.shape[0] == 2:
            logits = logits[1:] + (settings.cfg_scale + 1) * (logits[:1] - logits[1:])
        if amount:
            logits += amount[0][..., None] * (jnp.arange(config.vocab_size) == raised[0][..., None])
        return candidates(ban(logits[0], banned), uniform, settings)

    passes, rows, positions, width = hidden.shape
    slices = slices_of(positions, passes * rows // pieces("rows", rows) * config.vocab_size)
    by_position = (uniform,) if raised is None else (uniform, raised[1])
    if slices == 1:
        return propose_slice((hidden, *by_position))
    size = positions // slices
    parts = lax.map(
        propose_slice,
        (
            jnp.moveaxis(hidden.reshape(passes, rows, slices, size, width), 2, 0),
            *(jnp.moveaxis(x.reshape(rows, slices, size, *x.shape[2:]), 1, 0) for x in by_position),
        ),
    )
    return jax.tree.map(lambda part: jnp.moveaxis(part, 0, 1).reshape(rows, positions), parts)


def propose_at(
    config: DenoiserConfig,
    base: dict,
    read: Read,
    uniform: Array,
    eligible: Array,
    settings: SamplerConfig,
    boost: Boost | None = None,
) -> tuple[Array, ...]:
    """Chooses candidates as `propose` does, at the positions `eligible` [B, S]; values elsewhere have no meaning.

    The fewer positions are still masked, the fewer are read. Their number is rounded up to a multiple of S/8, or of
    S/16 if the head costs more than the layers, but at least of `LEAST`, so that few programs are compiled.

    Args:
      read: a function from positions [B, S'] to hidden states [B, S', D]; with guidance from [2B, S'] to [2B, S', D].
    """
    rows, positions = eligible.shape
    # The numbers of parameters of the layers and of the head are compared after division by the hidden size.
    layers = config.num_layers * (4 * config.hidden_size + 3 * config.intermediate_size)
    step = max(LEAST, -(-positions // (16 if config.vocab_size > layers else 8)))
    sizes = [*range(step, positions, step), positions]
    order = jnp.argsort(~eligible, axis=1, stable=True)
    back = jnp.argsort(order, axis=1)
    passes = 2 if settings.cfg_scale > 0 else 1

    def propose_first(size: int) -> tuple[Array, ...]:
        place = order[:, :size]
        hidden = read(jnp.repeat(place, passes, axis=0))
        hidden = jnp.moveaxis(hidden.reshape(rows, passes, size, -1), 1, 0)
        raised = None if boost is None else boost.at(place)
        numbers = jnp.take_along_axis(uniform, place[..., None], axis=1)
        found = propose(config, base, hidden, numbers, settings, raised)
        beyond = [(0, 0), (0, positions - size)]
        return jax.tree.map(lambda x: jnp.take_along_axis(jnp.pad(x, beyond), back, axis=1), found)

    most = jnp.max(jnp.sum(eligible, axis=1))
    chosen = jnp.sum(most > jnp.asarray(sizes[:-1], jnp.int32))
    return lax.switch(chosen, [functools.partial(propose_first, size) for size in sizes])
