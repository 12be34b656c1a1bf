"""Computes the probability of a step whose ranks are decided by noise, as an integral over arrival times.

The candidates with the largest `s + Gumbel noise` are distributed as the first arrivals among exponential times of
rates `w = e^s`. The probability that a set U arrives before all others is thus an integral over the time at which the
last of U arrives,

    int dt  d/dt prod_{k in U} (1 - e^{-w_k t})  prod_{others j} S_j(t),

where `S_j(t)` is the probability that j has not arrived by the time t.

S positions of the step's region, N nodes of the integral, v tokens of a chunk of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from gdsd_jax.diffusion.remasking import SamplerConfig

# The integral is a sum over even steps of log t. Less than e^-17 of the whole lies before the first node, and less than
# e^-40 after the last. The error of the sum is e^-24, as the integrand is analytic where |Im log t| < pi / 2.
SPACING, BEFORE, BEHIND = 0.4, 17.0, 3.69


def nodes(rate: Array, most: Array, runs: Array, eligible: Array, settings: SamplerConfig, vocab_size: int) -> Array:
    """Returns the values of log t, `[..., N]`, over which the integral is summed.

    They range from before the first arrival to after the last arrival of the committed candidates.

    Args:
      rate: `[..., S]`, the log rates of the committed candidates.
      most: `[..., S]`, the largest log rate that any candidate may have.
      runs: `[..., S]` bool, which committed candidates take part in the race.
      eligible: `[..., S]` bool, the positions that the step may commit.
    """
    spread = 0.0
    if settings.alg_temp:
        spread = (math.log(vocab_size) if settings.strategy == "entropy" else 1.0) / settings.alg_temp
    count = math.ceil((spread + math.log(rate.shape[-1]) + BEFORE + BEHIND) / SPACING) + 1
    soon = -jax.nn.logsumexp(jnp.where(eligible, most, -1e30), axis=-1) - BEFORE
    late = BEHIND - jnp.min(jnp.where(runs, lax.stop_gradient(rate), jnp.inf), axis=-1)
    usable = jnp.any(runs, axis=-1)
    soon, late = jnp.where(usable, soon, 0.0), jnp.where(usable, late, 1.0)
    return soon[..., None] + (late - soon)[..., None] * jnp.linspace(0, 1, count, dtype=rate.dtype)


def time(rate: Array, log_t: Array) -> Array:
    """Computes `w t`, `[..., S, N]`, capped at e^BEHIND; beyond it the integrand and its gradient are negligible."""
    return jnp.exp(jnp.minimum(rate[..., None] + log_t[..., None, :], BEHIND))


def summed_survival(
    walk: Callable, candidates: Callable, log_t: Array, settings: SamplerConfig, shape: tuple, dtype: Any
) -> Array:
    """Computes `sum_v q(v) e^{-w(v) t}`, `[..., S, N]`, over the tokens that may stay uncommitted.

    The nodes are computed one by one, so that no array has both the node and the vocabulary axis.
    """

    def step(total: Array, z: Array, ids: Array) -> Array:
        q, s, stays, late = candidates(z, ids)

        @jax.checkpoint
        def at(node: Array) -> Array:
            x = jnp.exp(jnp.minimum(s / settings.alg_temp + node[..., None, None], BEHIND))
            return jnp.sum(jnp.where(stays, q * jnp.exp(-jnp.where(late, 0.0, x)), 0.0), axis=-1)

        return total + jnp.moveaxis(lax.map(at, jnp.moveaxis(log_t, -1, 0)), 0, -1)

    return walk(step, jnp.zeros((*shape, log_t.shape[-1]), dtype))


def race(rate: Array, log_t: Array, runs: Array, lead: Array, rest: Array, log_survival: Array, early: bool) -> Array:
    """Computes the log-probability `[...]` that all of `runs` arrive before `rest`.

    With `early` it is the log-probability that one of `lead` is the first to arrive.

    Args:
      rate: `[..., S]`, the log rates of the committed candidates.
      log_t: `[..., N]`, the nodes.
      log_survival: `[..., S, N]`, the log-probability that a position of `rest` has not arrived by each time.
    """
    tiny = jnp.finfo(rate.dtype).tiny  # keeps the gradient finite where no candidate takes part
    x = time(rate, log_t)
    others = jnp.sum(jnp.where(rest[..., None], log_survival, 0.0), axis=-2)
    runs, lead = runs[..., None], lead[..., None]
    if early:
        someone = jnp.sum(jnp.where(lead, x, 0.0), axis=-2)
        density = jnp.log(jnp.maximum(someone, tiny)) - jnp.sum(jnp.where(runs, x, 0.0), axis=-2)
    else:
        arrived = jnp.sum(jnp.where(runs, jnp.log(-jnp.expm1(-x)), 0.0), axis=-2)
        last = jnp.sum(jnp.where(runs, x / jnp.expm1(x), 0.0), axis=-2)
        density = arrived + jnp.log(jnp.maximum(last, tiny))
    width = (log_t[..., -1] - log_t[..., 0]) / (log_t.shape[-1] - 1)
    return jax.nn.logsumexp(density + others, axis=-1) + jnp.log(width)
