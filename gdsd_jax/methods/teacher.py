"""The closed form of Guided Denoiser Self-Distillation (arXiv 2605.29398): one squared error against its teacher.

The optimum of `max E[psi A] - KL(pi || pi_old) - beta KL(pi || pi_ref)` induces the teacher denoiser
`p* ~ p_old^(1-beta) p_ref^beta exp(psi A)`. With centred logits, in which the partition function drops out,

    loss = mean_{i,m} (x_theta - (1 - beta) x_old - beta x_ref - psi A_i)^2

over rows i and views m, without a clip. `x` is the centred logit of each token (the squared errors are then averaged
over tokens), or the mean of these over the sequence. Advantages are leave-one-out.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from gdsd_jax.diffusion.scoring import Views
from gdsd_jax.methods import common
from gdsd_jax.methods.gdsd import Centred, centred_read, group_advantages
from gdsd_jax.methods.method import Batch, Method, Scores


@dataclasses.dataclass(frozen=True)
class Teacher(Centred):
    """Settings of `gdsd_teacher`: those of `gdsd_tlc`, and one more.

    Attributes:
      eps_low, eps_high: not used, because there is no trust region.
      level: "token" fits the centred logit of each token, "sequence" their mean over the sequence.
    """

    weighting: str = "plain"
    level: str = "token"

    def __post_init__(self):
        super().__post_init__()
        common.require(self.level in ("token", "sequence"), f"level {self.level!r} is not 'token' or 'sequence'")


def make(settings: Teacher) -> Method:
    guided = centred_read(settings)

    def views(masked: jax.Array, batch: Batch) -> Views:
        return common.coupled_views(masked, batch, weighted=settings.weighting == "elbo")

    def score(reads: dict, views: Views) -> Scores:
        def of(values: jax.Array) -> jax.Array:
            if settings.level == "sequence":
                return common.weighted_sum(values, views)[..., None] / views.weights.shape[-1]
            return jnp.swapaxes(2.0 * views.weights * values, 0, 1)

        # The metric KL cannot be computed from centred logits, so it has a score of its own.
        return Scores(of(reads[guided]), of(reads["log_prob"]) if "log_prob" in reads else None)

    def prepare(batch: Batch, old: Scores | None, ref: Scores | None) -> dict:
        rows, length = batch.completion_mask.shape
        return {
            "advantage": group_advantages(batch, settings),
            "old": None if old is None else old.guided,
            "ref": None if ref is None else ref.guided,
            "ref_log_prob": None if ref is None else ref.normalised,
            "rows": common.per_row(rows, rows),
            "length": common.per_row(length, rows),
        }

    def objective(new: Scores, constants: dict) -> tuple[dict, dict]:
        x = new.guided
        old = common.old_or_new(constants["old"], x)
        ref = old if constants["ref"] is None else constants["ref"]
        blended = (1 - settings.beta) * old + settings.beta * ref
        error = x - blended - settings.psi * constants["advantage"][:, None, None]
        metrics = {"score_spread": common.spread(jnp.mean(x, axis=2)), **common.size_of("log_ratio", x - old)}
        metrics["target"] = jnp.abs(settings.psi * constants["advantage"])
        metrics["residual"] = jnp.mean(jnp.abs(error), axis=(1, 2))
        if constants["ref_log_prob"] is not None:
            # The KL is per token. For sequences it is, as in `gdsd`, the squared sum over tokens divided by the length.
            tokens = constants["length"][:, None, None] if settings.level == "sequence" else 1.0
            metrics |= common.size_of("kl", tokens * common.k2(new.normalised, constants["ref_log_prob"]))
        return {"objective": jnp.mean(error**2, axis=(1, 2)) / constants["rows"]}, metrics

    masks = common.stratified_masks(settings.views, settings.masking, settings.block_length)
    reads = (guided, "log_prob") if settings.beta > 0 else (guided,)
    return Method(reads, masks, views, score, prepare, objective, needs_reference=settings.beta > 0)
