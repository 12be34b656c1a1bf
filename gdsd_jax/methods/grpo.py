"""diffu-GRPO (d1, arXiv 2504.12216), and the token-level PPO that coupled-GRPO and UniGRPO share with it.

    loss = sum_{i,k} w_ik [ -min(r_ik A_i, clip(r_ik) A_i) + beta KL_ik ],    r = exp(l_theta - l_old)

over rows i and completion tokens k, with `clip` to `[1 - eps_low, 1 + eps_high]` and the k3 estimate
`exp(-d) + d - 1`, `d = l_theta - l_ref`, for the KL. diffu-GRPO reads `l_ik` in one view that masks the whole
completion, and prompt tokens with probability 0.15. `w = c / sum c` over the batch, `c` the completion mask;
`A = r - group mean`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from gdsd_jax.diffusion.scoring import Views
from gdsd_jax.methods import common
from gdsd_jax.methods.method import Batch, Method, Scores
from gdsd_jax.runtime.ranges import Bound, Share


@dataclasses.dataclass(frozen=True)
class PPO:
    """Settings of a token-level PPO.

    Attributes:
      eps_low, eps_high: trust region on the ratio of each token.
      beta: weight of the KL to the reference.
      kl: its estimator, a name of `common.KL`.
    """

    eps_low: Bound = 0.5
    eps_high: Bound = 0.5
    beta: float = 0.04
    kl: str = "k3"

    def __post_init__(self):
        common.require(self.kl in common.KL, f"kl {self.kl!r} is not one of {', '.join(common.KL)}")


@dataclasses.dataclass(frozen=True)
class Settings(PPO):
    """Settings of `diffu_grpo`.

    Attributes:
      prompt_mask_rate: probability that a prompt token is masked.
    """

    prompt_mask_rate: Share = 0.15


def make(settings: Settings) -> Method:
    masks = common.whole_completion(settings.prompt_mask_rate)
    return token_ppo(settings, masks, common.averaged_views, common.centred)


def token_ppo(settings: PPO, masks: Callable, views: Callable, own: Callable, *, masked_only: bool = False) -> Method:
    """Makes the method that has the objective above on the given masks and views.

    Args:
      own: computes the advantages, as `common.centred` does.
      masked_only: averages over the tokens with a positive weight in some view instead of over the completion mask,
        first within each row: `w = weighted / count in the row / B`.
    """

    def score(reads: dict, views: Views) -> Scores:
        # A token's log-probability is the weighted sum of its reads.
        l = jnp.sum(views.weights * reads["log_prob"], axis=0)  # noqa: E741
        read = jnp.any(views.weights > 0, axis=0)
        return Scores(l, l, {"share": read / jnp.maximum(jnp.sum(read, axis=1, keepdims=True), 1)})

    def prepare(batch: Batch, old: Scores | None, ref: Scores | None) -> dict:
        rows = batch.tokens.shape[0]
        c = batch.completion_mask
        return {
            "advantage": common.advantages(batch, own),
            "old": None if old is None else old.guided,
            "ref": ref.normalised if ref is not None and settings.beta else None,
            "weights": jnp.full_like(c, 1 / rows) if masked_only else common.mean_weights(c),
            "rows": common.per_row(rows, rows),
        }

    def objective(new: Scores, constants: dict) -> tuple[dict, dict]:
        log_ratio = new.guided - common.old_or_new(constants["old"], new.guided)
        advantage = constants["advantage"][:, None]
        w = constants["weights"] * new.extra["share"] if masked_only else constants["weights"]
        policy, clipped = common.ppo(log_ratio, advantage, settings.eps_low, settings.eps_high)
        losses = {"objective": policy}
        metrics = common.ratio_metrics(log_ratio, clipped)
        if constants["ref"] is not None:
            metrics["kl"] = common.KL[settings.kl](new.normalised, constants["ref"])
            losses["kl"] = settings.beta * metrics["kl"]
        # Metrics are averaged over rows later; the factor B turns this average into the weighted mean over tokens.
        weighted_means = {name: jnp.sum(w * x, axis=1) * constants["rows"] for name, x in metrics.items()}
        return {name: jnp.sum(w * x, axis=1) for name, x in losses.items()}, weighted_means

    return Method(("log_prob",), masks, views, score, prepare, objective, needs_reference=settings.beta > 0)
