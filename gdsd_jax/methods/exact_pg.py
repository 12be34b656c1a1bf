"""The policy gradient on the exact likelihood of the sampler's trajectory.

    loss = 1/B sum_i sum_s w_is [ -min(r_is A_i, clip(r_is) A_i) + beta k(p_is) + beta_old k_old(p_is) ]

over rows i and the denoising steps s that committed something, with `r = exp(p_theta - p_old)`. `p_is` is the
log-probability that step s commits exactly the positions and tokens that it committed, given the state before it
(`gdsd_jax.diffusion.trajectory_log_prob`; the equation is section 4 of arXiv 1707.06347 with steps as actions). At the
first update the gradient is `A grad log pi(trajectory)`, for the completion and its order together. This is an unbiased
estimate of the gradient of this sampler's expected reward. The gradient of the completion's own likelihood, a sum over
orders, differs from it. With `steps` set, that many steps of each row are drawn, evenly spread, and `w`, which is 1
otherwise, keeps the sum unbiased.

A step that the scored policy cannot take, because of rounding or because a token is cut, has no ratio. It is left out,
and the metric `impossible` is the share of such steps. `k` and `k_old` estimate the KL of trajectories to the reference
and to the old policy, by a function of `common.KL`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from gdsd_jax.diffusion.trajectory import StepViews, check_defined
from gdsd_jax.methods import common, steps
from gdsd_jax.methods.method import Batch, Method, Scores
from gdsd_jax.runtime.ranges import Bound, Count, Few


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of `exact_pg`.

    Attributes:
      eps_low, eps_high: trust region on the ratio of each step.
      beta: weight of the KL to the reference.
      beta_old: weight of the KL to the old policy.
      kl: the estimator of both, a name of `common.KL`.
      steps: steps per row and inner update, M; None: all.
      at_once: steps that share a forward pass; the gradient recomputes one pass after another.
    """

    eps_low: Bound = 0.2
    eps_high: Bound = 0.2
    beta: float = 0.0
    beta_old: float = 0.0
    kl: str = "k3"
    steps: Few | None = None
    at_once: Count = 8

    def __post_init__(self):
        common.require(self.kl in common.KL, f"kl {self.kl!r} is not one of {', '.join(common.KL)}")


def make(settings: Settings) -> Method:
    def masks(key: jax.Array, batch: Batch) -> jax.Array:
        commits = steps.of_batch(batch, "exact_pg")
        check_defined(batch.sampler)
        every, count = steps.distinct(commits, batch.step_limit)
        if settings.steps is None:
            chosen = every[:, : min(batch.step_limit, batch.completion_length)]
        else:
            offset = jax.random.uniform(key, (commits.shape[0], settings.steps))
            place = (jnp.arange(settings.steps) + offset) / settings.steps * count[:, None]
            chosen = jnp.take_along_axis(every, jnp.minimum(place.astype(jnp.int32), count[:, None] - 1), axis=1)
        return steps.masks_before(batch, chosen.T)

    def views(masked: jax.Array | None, batch: Batch) -> StepViews:
        steps.of_batch(batch, "exact_pg")
        if masked is None:
            masked = masks(jax.random.key(0), batch)
        return steps.views_before(masked, batch, at_once=settings.at_once)

    def score(reads: dict, views: StepViews) -> Scores:
        log_prob = jnp.sum(reads["step_log_prob"], axis=-1).T
        taken = (views.step != steps.NONE).T
        return Scores(log_prob, log_prob, {"taken": taken.astype(jnp.float32)})

    def prepare(batch: Batch, old: Scores | None, ref: Scores | None) -> dict:
        rows = batch.tokens.shape[0]
        _, count = steps.distinct(batch.commit_step, batch.step_limit)
        return {
            "advantage": common.advantages(batch, common.leave_one_out),
            "old": None if old is None else old.guided,
            "ref": ref.normalised if ref is not None and settings.beta else None,
            "weight": jnp.ones(rows) if settings.steps is None else count / settings.steps,
            "rows": common.per_row(rows, rows),
        }

    def objective(new: Scores, constants: dict) -> tuple[dict, dict]:
        rows, taken, weight = constants["rows"], new.extra["taken"], constants["weight"][:, None]
        old = common.old_or_new(constants["old"], new.guided)
        possible = taken * jnp.isfinite(new.guided) * jnp.isfinite(old)
        known = lambda p: jnp.where(possible > 0, p, 0.0)  # noqa: E731
        p, p_old = known(new.guided), known(old)
        policy, clipped = common.ppo(p - p_old, constants["advantage"][:, None], settings.eps_low, settings.eps_high)
        total = lambda x: jnp.sum(weight * possible * x, axis=1)  # noqa: E731
        mean = lambda x: jnp.sum(possible * x, axis=1) / jnp.maximum(jnp.sum(possible, axis=1), 1)  # noqa: E731
        losses = {"objective": total(policy) / rows}
        metrics = {"clipped": mean(clipped), "log_ratio": mean(jnp.abs(p - p_old)), "log_prob": total(p)}
        metrics["impossible"] = jnp.sum(taken - possible, axis=1) / jnp.maximum(jnp.sum(taken, axis=1), 1)
        metrics["kl_old"] = total(common.KL[settings.kl](p, p_old))
        if settings.beta_old:
            losses["kl_old"] = settings.beta_old * metrics["kl_old"] / rows
        if constants["ref"] is not None:
            ref = jnp.where(jnp.isfinite(constants["ref"]), constants["ref"], p)
            metrics["kl"] = total(common.KL[settings.kl](p, ref))
            losses["kl"] = settings.beta * metrics["kl"] / rows
        return losses, metrics

    return Method(("step_log_prob",), masks, views, score, prepare, objective, needs_reference=settings.beta > 0)
