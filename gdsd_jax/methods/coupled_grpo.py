"""coupled-GRPO (DiffuCoder, arXiv 2506.20639): token-level PPO on a full view and a complementary pair of views.

    l_ik = 1/2 ( l_full + (l_masked / t  or  l_complement / (1 - t)) ),   whichever view of the pair masks k
    loss = sum_{i,k} c_ik [ -min(r_ik A_i, clip(r_ik) A_i) + beta k3_ik ] / max(sum c, 1),   r = exp(l_theta - l_old)

over rows i and completion tokens k, with the completion mask `c`. The full view masks the whole completion. The pair is
a Bernoulli mask, whose ratio is drawn from `U(0.2, 0.8)` for the whole batch, and its complement. `t` is the share of
the batch's completion tokens that the mask actually covers. Advantages are leave-one-out.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from gdsd_jax.diffusion import masking
from gdsd_jax.diffusion.scoring import Views
from gdsd_jax.methods import common
from gdsd_jax.methods.grpo import PPO, token_ppo
from gdsd_jax.methods.method import Batch, Method
from gdsd_jax.runtime.ranges import Share


@dataclasses.dataclass(frozen=True)
class Settings(PPO):
    """Settings of `coupled_grpo`.

    Attributes:
      low, high: range of the mask ratio, which is drawn uniformly for each inner update.
    """

    beta: float = 0.01
    low: Share = 0.2
    high: Share = 0.8


def make(settings: Settings) -> Method:
    def masks(key: jax.Array, batch: Batch) -> jax.Array:
        ratio_key, key = jax.random.split(key)
        rows, length = batch.completion_mask.shape
        ratio = jax.random.uniform(ratio_key, minval=settings.low, maxval=settings.high)
        masked = masking.bernoulli(key, jnp.full((rows, 1), ratio), rows, length)
        return masking.behind_prompt(masked[None], batch.prompt_length)

    def views(masked: jax.Array, batch: Batch) -> Views:
        completion = masked[:, :, batch.prompt_length :]
        ratio = jnp.mean(completion, axis=(1, 2), keepdims=True, dtype=jnp.float32)
        share = jnp.where(completion, ratio, 1 - ratio)  # above 0 at every token
        pairs = common.coupled(masked, batch, 0.5 / share / masked.shape[0])
        full = masking.behind_prompt(jnp.ones_like(completion[:1]), batch.prompt_length)
        sources = (*pairs.sources, (pairs.masked.shape[0],))
        weights = jnp.concatenate([pairs.weights, jnp.full_like(pairs.weights[:1], 0.5)])
        return Views(jnp.concatenate([pairs.masked, full]), weights, sources)

    return token_ppo(settings, masks, views, common.leave_one_out)
