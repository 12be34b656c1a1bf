"""Guided Denoiser Self-Distillation (arXiv 2605.29398) and its token-level logit centralisation (TLC, Eq. 8).

The optimum of `max E[psi A] - KL(pi || pi_old) - beta KL(pi || pi_ref)` induces a teacher denoiser
`p* ~ p_old^(1-beta) p_ref^beta exp(psi A)`; the student is pulled to it by a squared error in log space:

    delta = clip(S_theta - S_old, log(1 - eps_low), log(1 + eps_high))
    loss  = sum_{i,m} (delta_{im} / L - psi A_i)^2 / B  +  beta sum_{i,m} 1/2 (P_theta - P_ref)_{im}^2 / (B M L)

over rows i and views m, as in the authors' public code. `S` sums over the completion tokens, each read in the view of a
coupled pair that masks it: in `gdsd` log-probabilities; in `gdsd_tlc` logits minus the mean of all logits (or of the k
largest), from which the normaliser drops out. `P` always sums log-probabilities. Advantages are leave-one-out.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from gdsd_jax.diffusion.scoring import Views
from gdsd_jax.methods import common
from gdsd_jax.methods.method import Batch, Method, Scores
from gdsd_jax.runtime.ranges import Bound, Count, Few


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Settings of `gdsd`.

    Attributes:
      psi: guidance scale per token: the paper's 10 is 10 / L here. The authors' code has 0.04 now; recipes had 1 or 10.
      eps_low, eps_high: trust region on the log-ratio of a sequence. `eps_low` from 1 on and infinity set no bound.
      beta: weight of the KL to the reference.
      weighting: "plain" counts every token once, "elbo" weights tokens as the evidence lower bound does.
      views: masked views per row and inner update, M.
      masking: "stratified" positions are uniform; "rollout_order" masks what the sampler committed last and least
        confidently, "rollout_order_random" the same blocks with random positions.
      block_length: the sampler's block, for the rollout orders; None: no blocks.
      scale_advantages: divide advantages by the standard deviation of the group's rewards.
    """

    psi: float = 0.04
    eps_low: Bound = 4e-4
    eps_high: Bound = 4e-4
    beta: float = 1e-3
    weighting: str = "plain"
    views: Few = 2
    masking: str = "stratified"
    block_length: Count | None = None
    scale_advantages: bool = False

    def __post_init__(self):
        common.require(self.weighting in ("plain", "elbo"), f"weighting {self.weighting!r} is not 'plain' or 'elbo'")
        common.require(self.masking in common.MASKINGS, f"masking {self.masking!r} is not one of {common.MASKINGS}")


@dataclasses.dataclass(frozen=True)
class Centred(Guidance):
    """Settings of `gdsd_tlc`: those of `gdsd`, with ELBO weights by default, and one more.

    Attributes:
      top_k: logits are centred by the mean of this many largest ones; None: of all.
    """

    weighting: str = "elbo"
    top_k: Count | None = None


def make(settings: Guidance) -> Method:
    """Makes `gdsd` from `Guidance`, and `gdsd_tlc` from `Centred`."""
    guided = centred_read(settings) if isinstance(settings, Centred) else "log_prob"

    def views(masked: jax.Array, batch: Batch) -> Views:
        return common.coupled_views(masked, batch, weighted=settings.weighting == "elbo")

    def score(reads: dict, views: Views) -> Scores:
        sums = {name: common.weighted_sum(values, views) for name, values in reads.items()}
        return Scores(sums[guided], sums.get("log_prob"))

    def prepare(batch: Batch, old: Scores | None, ref: Scores | None) -> dict:
        rows, length = batch.completion_mask.shape
        return {
            "advantage": group_advantages(batch, settings),
            "old": None if old is None else old.guided,
            "ref": ref.normalised if ref is not None and settings.beta else None,
            "length": common.per_row(length, rows),
            "rows": common.per_row(rows, rows),
        }

    def objective(new: Scores, constants: dict) -> tuple[dict, dict]:
        length, rows = constants["length"], constants["rows"]
        difference = new.guided - common.old_or_new(constants["old"], new.guided)
        delta, clipped = common.log_clip(difference, settings.eps_low, settings.eps_high)
        error = delta / length[:, None] - settings.psi * constants["advantage"][:, None]
        losses = {"objective": jnp.sum(error**2, axis=1) / rows}
        metrics = {"clipped": jnp.mean(clipped, axis=1), "score_spread": common.spread(new.guided)}
        metrics |= common.size_of("log_ratio", difference) | common.pull_of(error, length)
        metrics["target"] = jnp.abs(settings.psi * constants["advantage"])
        if constants["ref"] is not None:
            kl = common.k2(new.normalised, constants["ref"]) / length[:, None]
            losses["kl"] = settings.beta * jnp.mean(kl, axis=1) / rows
            metrics |= common.size_of("kl", kl)
        return losses, metrics

    reads = (guided,) if settings.beta == 0 or guided == "log_prob" else (guided, "log_prob")
    masks = common.stratified_masks(settings.views, settings.masking, settings.block_length)
    return Method(reads, masks, views, score, prepare, objective, needs_reference=settings.beta > 0)


def centred_read(settings: Centred) -> Any:
    """Returns the name of the centred read, see `gdsd_jax.diffusion.scoring.read_tokens`."""
    return "centred" if settings.top_k is None else ("centred_top_k", settings.top_k)


def group_advantages(batch: Batch, settings: Guidance) -> jax.Array:
    """Returns the batch's advantages, or leave-one-out advantages if it has none."""
    return common.advantages(batch, functools.partial(common.leave_one_out, scale=settings.scale_advantages))
