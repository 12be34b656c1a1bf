"""ESPO, sequence-level policy optimisation on the evidence lower bound (arXiv 2512.03759).

    r_i  = exp((S_theta - S_old)_i / L)
    loss = -mean_i min(r_i A_i, clip(r_i) A_i)  +  beta sum_i 1/2 (S_theta - S_ref)_i^2 / (B L)

over B rows. `S` is the ELBO-weighted score of a coupled pair of views, averaged over the M pairs before the ratio is
taken; `clip` is to `[1 - eps_low, 1 + eps_high]`. Advantages are leave-one-out. All L positions count, including the
tail after the first EOS.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from gdsd_jax.diffusion.scoring import Views
from gdsd_jax.methods import common
from gdsd_jax.methods.method import Batch, Method, Scores
from gdsd_jax.runtime.ranges import Bound, Few


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of `espo`.

    Attributes:
      eps_low, eps_high: trust region on the ratio per token of the sequence.
      beta: weight of the KL to the reference; the authors' recipes have 1e-3 to 1e-2.
      kl: its estimator, a name of `common.KL`.
      views: coupled pairs per row and inner update, M.
    """

    eps_low: Bound = 0.2
    eps_high: Bound = 0.2
    beta: float = 1e-3
    kl: str = "k2"
    views: Few = 2

    def __post_init__(self):
        common.require(self.kl in common.KL, f"kl {self.kl!r} is not one of {', '.join(common.KL)}")


def make(settings: Settings) -> Method:
    def views(masked: jax.Array, batch: Batch) -> Views:
        return common.coupled_views(masked, batch, weighted=True)

    def score(reads: dict, views: Views) -> Scores:
        per_view = common.weighted_sum(reads["log_prob"], views)
        mean = jnp.mean(per_view, axis=1)
        return Scores(mean, mean, {"spread": common.spread(per_view)})

    def prepare(batch: Batch, old: Scores | None, ref: Scores | None) -> dict:
        rows, length = batch.completion_mask.shape
        return {
            "advantage": common.advantages(batch, common.leave_one_out),
            "old": None if old is None else old.guided,
            "ref": ref.normalised if ref is not None and settings.beta else None,
            "length": common.per_row(length, rows),
            "rows": common.per_row(rows, rows),
        }

    def objective(new: Scores, constants: dict) -> tuple[dict, dict]:
        length, rows = constants["length"], constants["rows"]
        log_ratio = (new.guided - common.old_or_new(constants["old"], new.guided)) / length
        policy, clipped = common.ppo(log_ratio, constants["advantage"], settings.eps_low, settings.eps_high)
        losses = {"objective": policy / rows}
        metrics = common.ratio_metrics(log_ratio, clipped)
        metrics["score_spread"] = new.extra["spread"]
        if constants["ref"] is not None:
            kl = common.KL[settings.kl](new.normalised, constants["ref"]) / length
            losses["kl"] = settings.beta * kl / rows
            metrics["kl"] = kl
        return losses, metrics

    masks = common.stratified_masks(settings.views)
    return Method(("log_prob",), masks, views, score, prepare, objective, needs_reference=settings.beta > 0)
