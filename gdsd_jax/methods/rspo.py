"""RSPO, our reading of its abstract (arXiv 2605.10218): the log-ratio to the reference is fitted to the advantage.

    loss = 1/B sum_i 1/2 (d_i - A_i / tau)^2,    d = (S_theta - S_ref) / L

over B rows. The abstract names neither the estimator of the likelihood nor a scale or clip. Here `S` is ESPO's bound,
the ELBO-weighted score of a coupled pair of views averaged over M pairs, `A` is leave-one-out, and nothing is clipped.
The loss is the closed form of GDSD whose old policy is the reference (beta = 1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gdsd_jax.diffusion.scoring import Views
from gdsd_jax.methods import common
from gdsd_jax.methods.method import Batch, Method, Scores
from gdsd_jax.runtime.ranges import Few, Positive


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of `rspo`.

    Attributes:
      tau: temperature of the advantages, per token.
      views: coupled pairs per row and inner update, M.
    """

    tau: Positive = 1.0
    views: Few = 2


def bound_method(views_per_row: int, prepare: Callable[..., dict], *, current: bool) -> Method:
    """Makes a method that fits `d`, the log-ratio to the reference, to the target of `prepare` by squared error."""

    def views(masked: jax.Array, batch: Batch) -> Views:
        return common.coupled_views(masked, batch, weighted=True)

    def score(reads: dict, views: Views) -> Scores:
        per_view = common.weighted_sum(reads["log_prob"], views) / views.weights.shape[-1]
        mean = jnp.mean(per_view, axis=1)
        return Scores(mean, mean, {"spread": common.spread(per_view)})

    def objective(new: Scores, constants: dict) -> tuple[dict, dict]:
        d = new.guided - constants["ref"]
        error = d - constants["target"]
        losses = {"objective": constants["weight"] * error**2}
        return losses, {"kl": 0.5 * d**2, "residual": jnp.abs(error), "score_spread": new.extra["spread"]}

    masks = common.stratified_masks(views_per_row)
    return Method(
        ("log_prob",), masks, views, score, prepare, objective, needs_reference=True, old="unused", current=current
    )


def make(settings: Settings) -> Method:
    def prepare(batch: Batch, old: Scores | None, ref: Scores | None) -> dict:
        rows = batch.tokens.shape[0]
        return {
            "ref": jnp.zeros(rows) if ref is None else ref.normalised,
            "target": common.advantages(batch, common.leave_one_out) / settings.tau,
            "weight": common.per_row(0.5 / rows, rows),
        }

    return bound_method(settings.views, prepare, current=False)
