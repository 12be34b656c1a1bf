"""AGRPO, policy gradients on drawn steps of the rollout (arXiv 2510.04019).

    loss = 1/(M G) sum_{i,m} w_im sum_{k in U_s} [ -min(r_ik A_i, clip(r_ik) A_i) + beta k3_ik r_ik ]

over rows i and M steps s of each row, which are drawn with probability `p_is`; `w = 1 / (T_i p_is)`. `U_s` are the
tokens that step s committed, scored in the state before it with the sampler's temperature and cuts (top_p, top_k). The
denominator of `r` is the probability with which the sampler drew the token; k3 compares with the reference. `p_is` is
uniform, or proportional to 1e-8 plus the sum over `U_s` of the recorded entropies. It is 0 for all steps after the last
one that committed a token other than EOS; `T_i` counts the steps up to that one. The sum over rows is divided by the
group size, not the batch size. `A` is the reward minus its group mean. If the order of commits does not depend on the
policy, only the omitted tail and the factor `1/T` bias the gradient.

The cuts are those of the scored policy. The authors keep those of the rollout, which are the same until the policy
moves.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from gdsd_jax.diffusion.trajectory import StepViews
from gdsd_jax.methods import common, steps
from gdsd_jax.methods.method import Batch, Method, Scores
from gdsd_jax.runtime.ranges import Bound, Count, Few


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of `agrpo`.

    Attributes:
      eps_low, eps_high: trust region on the ratio of each token.
      beta: weight of the KL to the reference.
      steps: steps drawn per row and inner update, M.
      importance: draw steps in proportion to their entropy instead of uniformly.
      at_once: steps that share a forward pass.
    """

    eps_low: Bound = 0.2
    eps_high: Bound = 0.2
    beta: float = 0.0
    steps: Few = 24
    importance: bool = True
    at_once: Count = 8


def step_probabilities(batch: Batch, importance: bool) -> tuple[jax.Array, jax.Array]:
    """Computes the probability `p` of drawing each step, `[B, steps]`, and `T`, `[B]`."""
    commits, count = steps.of_batch(batch, "agrpo", "entropy"), batch.step_limit
    counted = commits < count
    if batch.eos_token_id is not None:
        counted &= batch.tokens[:, batch.prompt_length :] != batch.eos_token_id
    end = 1 + jnp.max(jnp.where(counted, commits, 0), axis=1)
    entropy = steps.by_step(batch.entropy, batch, count)[0] + 1e-8
    weight = jnp.where(jnp.arange(count) < end[:, None], entropy if importance else 1.0, 0.0)
    return weight / jnp.sum(weight, axis=1, keepdims=True), end


def drawn_steps(uniform: jax.Array, p: jax.Array) -> jax.Array:
    """Returns the steps `[B, M]` at which the cumulative sum of `p` `[B, steps]` first exceeds `uniform` `[B, M]`."""
    total = jnp.cumsum(p, axis=1)
    drawn = jnp.sum(total[:, None, :] <= uniform[..., None], axis=-1)
    last = jnp.sum(jnp.cumsum(p[:, ::-1], axis=1) > 0, axis=1, keepdims=True) - 1
    return jnp.minimum(drawn, last)


def make(settings: Settings) -> Method:
    def masks(key: jax.Array, batch: Batch) -> jax.Array:
        p, _ = step_probabilities(batch, settings.importance)
        uniform = steps.stratified_uniform(key, p.shape[0], settings.steps)
        return steps.masks_before(batch, drawn_steps(uniform, p).T)

    def views(masked: jax.Array, batch: Batch) -> StepViews:
        p, end = step_probabilities(batch, settings.importance)
        found = steps.views_before(masked, batch, at_once=settings.at_once)
        own = jnp.take_along_axis(p, jnp.maximum(found.step, 0).T, axis=1).T
        return found.replace(weights=found.weights / jnp.where(own > 0, end * own, jnp.inf)[..., None])

    def score(reads: dict, views: StepViews) -> Scores:
        log_prob = jnp.swapaxes(reads["proposal_log_prob"], 0, 1)
        return Scores(log_prob, log_prob, {"weight": jnp.swapaxes(views.weights, 0, 1)})

    def prepare(batch: Batch, old: Scores | None, ref: Scores | None) -> dict:
        steps.of_batch(batch, "agrpo", "log_prob")
        rows = batch.tokens.shape[0]
        return {
            "advantage": common.advantages(batch, common.centred),
            "old": batch.log_prob,
            "ref": ref.normalised if ref is not None and settings.beta else None,
            "group": common.per_row(batch.group_size, rows),
        }

    def objective(new: Scores, constants: dict) -> tuple[dict, dict]:
        w, l = new.extra["weight"], new.guided  # noqa: E741
        possible = w * jnp.isfinite(l)
        l = jnp.where(possible > 0, l, 0.0)  # noqa: E741
        log_ratio = jnp.where(possible > 0, l - constants["old"][:, None], 0.0)
        advantage = constants["advantage"][:, None, None]
        policy, clipped = common.ppo(log_ratio, advantage, settings.eps_low, settings.eps_high)
        total = lambda x: jnp.sum(possible * x, axis=(1, 2)) / w.shape[1]  # noqa: E731
        read = jnp.maximum(jnp.sum(possible > 0, axis=(1, 2)), 1)
        metrics = common.ratio_metrics(log_ratio, clipped)
        metrics = {name: jnp.sum((possible > 0) * x, axis=(1, 2)) / read for name, x in metrics.items()}
        losses = {"objective": total(policy) / constants["group"]}
        if constants["ref"] is not None:
            kl = total(common.k3(l, jnp.where(possible > 0, constants["ref"], 0.0)) * common.ratio_of(log_ratio))
            losses["kl"], metrics["kl"] = settings.beta * kl / constants["group"], kl
        return losses, metrics

    return Method(
        ("proposal_log_prob",), masks, views, score, prepare, objective,
        needs_reference=settings.beta > 0, old="unused", records=True,
    )  # fmt: skip
