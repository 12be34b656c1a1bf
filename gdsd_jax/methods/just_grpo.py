"""JustGRPO, GRPO on left-to-right likelihoods of a masked denoiser (arXiv 2601.15165).

    loss = 1/N sum_{i,k} -min(r_ik A_i, clip(r_ik) A_i) / (L (n + 1e-5)),    r = exp(l_theta - stopgrad l_theta) = 1

over rows i of N groups and all L completion tokens k, including the tail after the first EOS, except tokens that
`stop_at_eos` filled in without drawing them. `l_ik` is read in the view that masks k and all tokens after it. It is
exact if the rollout wrote one token after another (`config.sampler.block_length=1`, `steps` = L). `n` is the number of
rows of a group whose advantage is not 0, averaged over groups; `A = (reward - mean) / (std + 1e-4)` with the sample
standard deviation. The ratio is 1 and its clip has no effect, because the authors update once per rollout. There is no
KL. The authors add up the gradients of the N groups, which scales their loss by N. Each row needs L passes, of which
`at_once` are computed together.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from gdsd_jax.diffusion import SamplerConfig, masking
from gdsd_jax.diffusion.trajectory import StepViews, step_views
from gdsd_jax.methods import common, steps
from gdsd_jax.methods.method import Batch, Method, Scores
from gdsd_jax.runtime.ranges import Count


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of `just_grpo`.

    Attributes:
      at_once: positions that share a forward pass.
    """

    at_once: Count = 16


def make(settings: Settings) -> Method:
    def masks(key: jax.Array, batch: Batch) -> jax.Array:
        length = batch.completion_length
        suffix = jnp.arange(length) >= jnp.arange(length)[:, None]
        suffix = jnp.broadcast_to(suffix[:, None], (length, *batch.completion_mask.shape))
        return masking.behind_prompt(suffix, batch.prompt_length)

    def views(masked: jax.Array | None, batch: Batch) -> StepViews:
        """Builds the views from the length alone; the given masks are not used."""
        rows, length = batch.completion_mask.shape
        one_by_one = SamplerConfig(length, length, 1, "low_confidence", temperature=1.0, forbid_mask=False)
        position = jnp.broadcast_to(jnp.arange(length), (rows, length))
        views = step_views(position, position.T, batch.prompt_length, one_by_one, at_once=settings.at_once)
        # A token that `stop_at_eos` filled in was not drawn.
        return views.replace(weights=views.weights * steps.sampled(batch))

    def score(reads: dict, views: StepViews) -> Scores:
        log_prob = jnp.sum(views.weights * reads["log_prob"], axis=0)
        return Scores(log_prob, log_prob)

    def prepare(batch: Batch, old: Scores | None, ref: Scores | None) -> dict:
        (rows, length), size = batch.completion_mask.shape, batch.group_size
        advantage = common.advantages(batch, common.scaled)
        count = jnp.mean(jnp.sum((advantage != 0).reshape(-1, size), axis=1))
        share = 1 / (length * (count + 1e-5) * (rows // size))
        return {"weight": advantage * share, "length": common.per_row(length, rows)}

    def objective(new: Scores, constants: dict) -> tuple[dict, dict]:
        policy, _ = common.ppo(new.guided - jax.lax.stop_gradient(new.guided), constants["weight"][:, None], 0.2, 0.2)
        return {"objective": jnp.sum(policy, axis=1)}, {"log_prob": jnp.sum(new.guided, axis=1) / constants["length"]}

    return Method(("log_prob",), masks, views, score, prepare, objective, needs_reference=False, old="unused")
