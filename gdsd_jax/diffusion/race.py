"""Integrals over exponential arrival times: the probability of a step whose ranks are decided by noise.

The candidates with the largest `s + Gumbel noise` are distributed as the first arrivals among exponential times of
rates `w = e^s`. So the probability that a set U comes before all others is one integral over the time at which the last
of U arrives,

    int dt  d/dt prod_{k in U} (1 - e^{-w_k t})  prod_{others j} S_j(t),

where `S_j(t)` is the probability that j has not arrived by the time t.

S positions that a step looks at, N nodes of the integral, v tokens of a chunk of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from gdsd_jax.diffusion.remasking import SamplerConfig

# The integral is a sum over even steps in log t. It leaves out less than e^-17 of the whole before the first node and
# e^-40 after the last; the sum itself is exact to e^-24, as the integrand is analytic where |Im log t| < pi / 2.
SPACING, BEFORE, BEHIND = 0.4, 17.0, 3.69


def nodes(rate: Array, most: Array, runs: Array, eligible: Array, settings: SamplerConfig, vocab_size: int) -> Array:
    """Returns the values of log t, `[..., N]`, over which the integral is a sum.

    The first lies before the first arrival and the last one after the last arrival.

    Args:
      rate: `[..., S]`, log rates of the committed candidates.
      most: `[..., S]`, the largest log rate that any candidate may have.
      runs: `[..., S]`, the committed candidates that take part.
      eligible: `[..., S]`, the positions that the step may commit.
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
    """Computes `w t`, `[..., S, N]`, capped at e^BEHIND, beyond which the integrand and its gradient are negligible."""
    return jnp.exp(jnp.minimum(rate[..., None] + log_t[..., None, :], BEHIND))


def summed_survival(
    walk: Callable, candidates: Callable, log_t: Array, settings: SamplerConfig, shape: tuple, dtype: Any
) -> Array:
    """Computes `sum_v q(v) e^{-w(v) t}`, `[..., S, N]`, over the tokens that may stay uncommitted, node by node."""

    def step(total: Array, z: Array, ids: Array) -> Array:
        q, s, stays, late = candidates(z, ids)

        @jax.checkpoint
        def at(node: Array) -> Array:
            x = jnp.exp(jnp.minimum(s / settings.alg_temp + node[..., None, None], BEHIND))
            return jnp.sum(jnp.where(stays, q * jnp.exp(-jnp.where(late, 0.0, x)), 0.0), axis=-1)

        return total + jnp.moveaxis(lax.map(at, jnp.moveaxis(log_t, -1, 0)), 0, -1)

    return walk(step, jnp.zeros((*shape, log_t.shape[-1]), dtype))


def race(rate: Array, log_t: Array, runs: Array, lead: Array, rest: Array, log_survival: Array, early: bool) -> Array:
    """Computes the log-probability `[...]` that all of `runs` arrive before the rest.

    With `early` it is the log-probability that one of `lead` is the first to arrive.

    Args:
      log_survival: `[..., S, N]`, log-probability that a position of the rest has not arrived.
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
