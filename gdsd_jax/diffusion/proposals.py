"""Candidates of a step: the logits of the positions that are read are cut, and each position draws one token.

B rows, S positions that a step looks at, D hidden size, V vocabulary.
"""

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

# A device holds logits of at most this many elements at once, 1 GiB in float32; a larger region is read in slices of
# positions.
MAX_LOGITS = 2**28
LEAST = 2  # positions; a program for fewer gains too little to be compiled
GROUP = 128  # tokens per group


def keep_top_p(logits: Array, top_p: float) -> Array:
    """Keeps the most probable tokens, up to and including the first one that takes their mass beyond top_p.

    A token stays when the mass of all more probable tokens is at most top_p; the logits of the others become -inf.
    """
    probs = jax.nn.softmax(logits)
    bits = lax.bitcast_convert_type(probs, jnp.int32)
    mass_above = lambda middle: jnp.sum(jnp.where(bits > middle[..., None], probs, 0), axis=-1)  # noqa: E731
    cut = top_p_cut(mass_above, jnp.max(bits, axis=-1), top_p)
    return jnp.where(bits >= cut[..., None], logits, -jnp.inf)


def top_p_cut(mass_above: Callable[[Array], Array], highest: Array, top_p: float) -> Array:
    """Returns the bits of the least probability that a cut at mass `top_p` keeps.

    Non-negative floats order like their bits, so bisecting the integers finds the cut exactly in 31 passes, a fraction
    of what sorting a large vocabulary costs.

    Args:
      mass_above: a function from bits to the mass of the tokens whose probability has greater bits.
      highest: the bits of the largest probability.
    """

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        too_low, enough = bounds
        middle = too_low + (enough - too_low) // 2
        fits = mass_above(middle) <= top_p
        return jnp.where(fits, too_low, middle), jnp.where(fits, middle, enough)

    return lax.fori_loop(0, 31, halve, (jnp.full_like(highest, -1), highest))[1]


def keep_top_k(logits: Array, top_k: int) -> Array:
    cut = lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits >= cut, logits, -jnp.inf)


def _take(values: Array, index: Array) -> Array:
    return jnp.take_along_axis(values, index[..., None], axis=-1)[..., 0]


def _invert(weights: Array, uniform: Array) -> Array:
    """Returns the first index [...] where the cumulative sum of `weights` [..., N] exceeds `uniform` times its total.

    A parallel cumulative sum need not be monotone to the last bit, nor exceed a target next to the total. Hence only
    positive weights can be chosen, and the largest one is taken when rounding leaves none.
    """
    total = jnp.cumsum(weights, axis=-1)
    hit = (total > (uniform * total[..., -1])[..., None]) & (weights > 0)
    return jnp.where(jnp.any(hit, axis=-1), jnp.argmax(hit, axis=-1), jnp.argmax(weights, axis=-1))


class Groups(NamedTuple):
    """Summaries of logits [..., V] by groups of GROUP tokens: a search for one token reads V once, and then one group.

    peak: [..., G], the highest logit of each group.
    mass: [..., G], the sum of each group's exp(logit - highest of all).
    """

    peak: Array
    mass: Array


def grouped(logits: Float[Array, "*S V"]) -> Groups:
    """Computes the peaks and masses of the G = ceil(V / GROUP) groups; impossible tokens fill up the last group."""
    beyond = [(0, 0)] * (logits.ndim - 1) + [(0, -logits.shape[-1] % GROUP)]
    groups = jnp.pad(logits, beyond, constant_values=-jnp.inf).reshape(*logits.shape[:-1], -1, GROUP)
    peak = jnp.max(groups, axis=-1)
    return Groups(peak, jnp.sum(jnp.exp(groups - jnp.max(peak, axis=-1)[..., None, None]), axis=-1))


def _read(logits: Array, group: Array) -> Array:
    """Reads the logits [..., GROUP] of the given group [...]."""
    place = group[..., None] * GROUP + jnp.arange(GROUP)
    return jnp.take_along_axis(logits, place, axis=-1, mode="fill", fill_value=-jnp.inf)


def best(logits: Float[Array, "*S V"], groups: Groups) -> Int[Array, "*S"]:
    """Returns the token with the highest logit, and of equal ones the first."""
    group = jnp.argmax(groups.peak, axis=-1)
    return (group * GROUP + jnp.argmax(_read(logits, group), axis=-1)).astype(jnp.int32)


def draw(logits: Float[Array, "*S V"], groups: Groups, uniform: Float[Array, "*S 2"]) -> Int[Array, "*S"]:
    """Draws one token per distribution by inverting cumulative sums at two numbers in [0, 1).

    The distribution is that of the argmax of logits plus Gumbel noise, from two random numbers instead of V. The first
    number draws a group, the second a token of this group. A single number, a multiple of 2^-23, could not tell apart
    the tokens of a group with little mass. A token of probability zero is never drawn.
    """
    group = _invert(groups.mass, uniform[..., 0])
    found = _read(logits, group)
    token = _invert(jnp.exp(found - jnp.max(found, axis=-1, keepdims=True)), uniform[..., 1])
    return (group * GROUP + token).astype(jnp.int32)


def candidates(logits: Array, uniform: Array, settings: SamplerConfig) -> tuple[Array, ...]:
    """Chooses one candidate token for each of the distributions `logits` [..., V].

    The random numbers `uniform` are [..., 2]. Returns the tokens, their probabilities under `logits`, and the
    strategy's scores. With `settings.record` it also returns the log-probabilities at which the candidates were drawn,
    and the entropies of the distributions `logits`.
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
    # The argmax is not drawn: at temperature 0 its log-probability is 0.
    drawn = _take(cut, token) - normaliser if settings.temperature > 0 else jnp.zeros_like(confidence)
    probs = jnp.exp(logits - plain[..., None])
    entropy = plain - jnp.sum(jnp.where(probs > 0, probs * logits, 0.0), axis=-1)
    return token, confidence, score, drawn, entropy


def banned_tokens(config: DenoiserConfig, settings: SamplerConfig) -> tuple[int, ...]:
    """Returns the ids that are never proposed: those suppressed, the mask, and ids that the tokenizer does not have."""
    return (*settings.suppress, *[config.mask_token_id] * settings.forbid_mask, *config.padding_tokens)


def ban(logits: Float[Array, "*S V"], tokens: Sequence[int]) -> Float[Array, "*S V"]:
    """Gives these tokens probability zero."""
    if not tokens:
        return logits
    banned = np.zeros(logits.shape[-1], bool)
    banned[list(tokens)] = True
    # An accelerator selects while it reads, and would copy the whole array to write a few numbers. On a CPU writing is
    # faster; the first index is given twice, because XLA turns a write at a single index into a select.
    return lax.platform_dependent(
        logits,
        cpu=lambda logits: logits.at[..., np.array([*tokens, tokens[0]])].set(-jnp.inf, mode="promise_in_bounds"),
        default=lambda logits: jnp.where(banned, -jnp.inf, logits),
    )


class Boost(NamedTuple):
    """One logit of each row that is raised before a candidate is chosen.

    place, token: [B] int32, the position in the step's region and the token.
    amount: [B] float32.
    """

    place: Array
    token: Array
    amount: Array

    def at(self, place: Array) -> tuple[Array, Array]:
        """Returns the tokens [B, 1], and by how much their logits are raised at places [B, S'] of the region."""
        return self.token[:, None], self.amount[:, None] * (place == self.place[:, None])


def propose(
    config: DenoiserConfig,
    base: dict,
    hidden: Array,
    uniform: Array,
    settings: SamplerConfig,
    raised: tuple[Array, Array] | None = None,
) -> tuple[Array, ...]:
    """Chooses the candidates [B, S] of hidden states; returns what `candidates` returns.

    The states `hidden` [1 or 2, B, S, D] are the conditional and, with guidance, the unconditional ones; the random
    numbers `uniform` are [B, S, 2]. Of `raised` the tokens are [B, 1], and the amounts added to their logits [B, S].
    """
    banned = banned_tokens(config, settings)

    def propose_slice(slices: tuple[Array, ...]) -> tuple[Array, ...]:
        hidden, uniform, *amount = slices
        logits = constrain(logits_from_hidden(config, base, hidden), ("views", "rows", "tokens", "vocab"))
        # From here on no sum over the vocabulary crosses devices: a draw does not depend on their number.
        logits = constrain(logits, ("views", "rows", "positions", "candidates"))
        if logits.shape[0] == 2:
            logits = logits[1:] + (settings.cfg_scale + 1) * (logits[:1] - logits[1:])
        if amount:
            logits += amount[0][..., None] * (jnp.arange(config.vocab_size) == raised[0][..., None])
        return candidates(ban(logits[0], banned), uniform, settings)

    passes, rows, positions, width = hidden.shape
    at_one_position = passes * rows // pieces("rows", rows) * config.vocab_size
    slices = next(
        n for n in range(1, positions + 1)
        if positions % n == 0 and (at_one_position * (positions // n) <= MAX_LOGITS or n == positions)
    )  # fmt: skip
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

    The fewer positions are still masked, the fewer are read: as many eighths of S as the row with the most masked
    positions needs, or sixteenths where the head outweighs the layers, in steps of at least `LEAST` positions.

    Args:
      read: gives hidden states [B, S', D] at places [B, S'] of S; with guidance [2B, S', D] at [2B, S'].
    """
    rows, positions = eligible.shape
    # The layers' parameters divided by the hidden size; for the head this number is vocab_size.
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
