"""TraceRL, reinforcement along the sampler's own trajectory (arXiv 2509.06949), without the value model.

    loss = -1/B sum_{i,g} mean_{k in g} min(r_ik A_i, clip(r_ik) A_i)  +  beta/B sum_{i,k} k3(l_theta - l_old)_ik

over rows i and groups g of completion tokens k, with `r = exp(l_theta - l_old)`. The distinct commit steps of a row are
sorted, and every `shrink` of them form one group. The view of group g masks the tokens committed in g or later, and
`l_ik` is read in the view of k's own group, so that each token is predicted from the tokens of earlier groups. `A` is
the z-score among a prompt's completions. The KL is to the old policy; there is no reference.

The number of views is static, `ceil(L / shrink)`; in a row with fewer groups, the remaining views mask nothing.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from gdsd_jax.diffusion import masking
from gdsd_jax.diffusion.scoring import Views
from gdsd_jax.methods import common, steps
from gdsd_jax.methods.method import Batch, Method, Scores
from gdsd_jax.runtime.ranges import Bound, Count


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of `tracerl`.

    Attributes:
      eps_low, eps_high: trust region on the ratio of each token.
      beta: weight of the KL to the old policy.
      shrink: commit steps per group; each group costs a forward pass per row.
    """

    eps_low: Bound = 0.2
    eps_high: Bound = 0.2
    beta: float = 0.01
    shrink: Count = 8


def trajectory_groups(commit_step: jax.Array, shrink: int) -> jax.Array:
    """Returns each token's group `[B, L]` int32, counted from 0 in the order of its row's distinct commit steps."""
    order = jnp.argsort(commit_step, axis=1, stable=True)
    steps = jnp.take_along_axis(commit_step, order, axis=1)
    is_next = jnp.pad(steps[:, 1:] != steps[:, :-1], [(0, 0), (1, 0)])
    rank = jnp.take_along_axis(jnp.cumsum(is_next, axis=1), jnp.argsort(order, axis=1), axis=1)
    return rank // shrink


def make(settings: Settings) -> Method:
    def trajectory(batch: Batch) -> jax.Array:
        """Builds one mask `[B, T]` per group, the last group first."""
        group = trajectory_groups(batch.commit_step, settings.shrink)
        views = -(-batch.completion_length // settings.shrink)
        index = jnp.arange(views)[::-1, None, None]
        return masking.behind_prompt(group[None] >= index, batch.prompt_length)

    def masks(key: jax.Array, batch: Batch) -> jax.Array:
        common.require(batch.commit_step is not None, "tracerl replays commit steps and the rollout holds none")
        return trajectory(batch)

    def views(masked: jax.Array | None, batch: Batch) -> Views:
        """Builds views from the commit steps; without these, from the given masks, which are nested, smallest first."""
        given = batch.commit_step is None
        common.require(not given or masked is not None, "tracerl needs commit_step, or nested masks")
        masked = masked if given else trajectory(batch)
        # Nested masks number the groups: a token of group g is masked in the views of groups 0 to g.
        count = jnp.sum(masked[:, :, batch.prompt_length :], axis=0)
        scored = (count > 0) & steps.sampled(batch)
        members = jnp.sum((count[:, :, None] == count[:, None, :]) & scored[:, None, :], axis=2)
        weights = jnp.where(scored, 1 / jnp.maximum(members, 1), 0.0).astype(jnp.float32)
        # The view of the last group comes first, so the first view that masks a token is that of its own group.
        return Views(masked, weights[None], (tuple(range(masked.shape[0])),))

    def score(reads: dict, views: Views) -> Scores:
        log_prob = reads["log_prob"][0]
        return Scores(log_prob, log_prob, {"share": views.weights[0]})

    def prepare(batch: Batch, old: Scores | None, ref: Scores | None) -> dict:
        rows = batch.tokens.shape[0]
        return {
            "advantage": common.advantages(batch, common.standardised),
            "old": None if old is None else old.guided,
            "rows": common.per_row(rows, rows),
        }

    def objective(new: Scores, constants: dict) -> tuple[dict, dict]:
        share, rows = new.extra["share"], constants["rows"]
        old = common.old_or_new(constants["old"], new.guided)
        log_ratio, advantage = new.guided - old, constants["advantage"][:, None]
        policy, clipped = common.ppo(log_ratio, advantage, settings.eps_low, settings.eps_high)
        kl = jnp.where(share > 0, common.k3(new.guided, old), 0.0)
        losses = {"objective": jnp.sum(share * policy, axis=1) / rows}
        if settings.beta:
            losses["kl_old"] = settings.beta * jnp.sum(kl, axis=1) / rows
        groups = jnp.maximum(jnp.sum(share, axis=1), 1)
        metrics = common.ratio_metrics(log_ratio, clipped)
        metrics["kl_old"] = kl
        means = {name: jnp.sum(share * x, axis=1) / groups for name, x in metrics.items()}
        return losses, {**means, "trajectory_groups": groups}

    return Method(("log_prob",), masks, views, score, prepare, objective, needs_reference=False)
