"""UniGRPO (MMaDA, arXiv 2505.15809): token-level PPO on the tokens that a mask of random ratio covers.

    loss = 1/B sum_i mean_{k masked} [ -min(r_ik A_i, clip(r_ik) A_i) + beta k3_ik ],    r = exp(l_theta - l_old)

over B rows. The prompt stays clean, and `A` is the z-score in the group. This follows the paper, as there is no public
code. In the paper the mask ratios of a rollout's inner updates are evenly spaced after a random first one; here each
inner update draws its own ratio, because its masks depend on its key alone. `eps_low`, `eps_high` and `beta` are our
choice.
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
from gdsd_jax.runtime.ranges import Bound


@dataclasses.dataclass(frozen=True)
class Settings(PPO):
    """Settings of `unigrpo`."""

    eps_low: Bound = 0.2
    eps_high: Bound = 0.2
    beta: float = 0.01


def make(settings: Settings) -> Method:
    def masks(key: jax.Array, batch: Batch) -> jax.Array:
        ratio_key, key = jax.random.split(key)
        rows, length = batch.completion_mask.shape
        count = jnp.ceil(jax.random.uniform(ratio_key) * length).astype(jnp.int32)
        counts = jnp.broadcast_to(jnp.clip(count, 1, length), rows)
        return masking.behind_prompt(masking.at_random(key, counts, length)[None], batch.prompt_length)

    def views(masked: jax.Array, batch: Batch) -> Views:
        completion = masked[:, :, batch.prompt_length :].astype(jnp.float32)
        return common.own_views(masked, batch, completion / jnp.maximum(jnp.sum(completion, axis=0), 1))

    return token_ppo(settings, masks, views, common.standardised, masked_only=True)
