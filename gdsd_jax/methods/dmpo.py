"""DMPO, distribution matching policy optimisation (arXiv 2510.08233).

    w+   = softmax over the group of (S_ref - S_old + r / alpha),    w-  with - r / alpha
    loss = 1/V sum_{i,v} (w+ - s w-)_i CE_iv / m_iv,    S_i = 1/V sum_v (L / m_iv) sum_{k masked in v} l_ik

over rows i and V = 4 views v, which are two antithetic pairs: Bernoulli masks of ratio `t ~ U(0.1, 1)` and their
complements. `CE_iv` is minus the sum of the `l_ik` masked in v, and `m_iv` (at least 1) is their number. The mean over
v of `CE_iv / m_iv` is thus `-S_i / L`, and the loss depends on the policy only through `S`:
`loss = - sum_i (w+ - s w-)_i S_i / L`. All L positions count, including the tail after the first EOS. `s` is
`negative_weight`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from gdsd_jax.diffusion import masking
from gdsd_jax.diffusion.scoring import Views
from gdsd_jax.methods import common
from gdsd_jax.methods.method import Batch, Method, Scores
from gdsd_jax.runtime.ranges import Few, Positive, Share


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of `dmpo`.

    Attributes:
      alpha: temperature of the rewards.
      negative_weight: s, the weight of the negative side.
      pairs: antithetic pairs of views per row, V / 2.
      low, high: range of the mask ratio of each row and pair.
    """

    alpha: Positive = 0.04
    negative_weight: float = 1.0
    pairs: Few = 2
    low: Share = 0.1
    high: Share = 1.0

    def __post_init__(self):
        common.require(self.low <= self.high, f"low {self.low} is above high {self.high}")


def make(settings: Settings) -> Method:
    def masks(key: jax.Array, batch: Batch) -> jax.Array:
        rows, length = batch.completion_mask.shape

        def draw(key: jax.Array) -> jax.Array:
            ratio_key, key = jax.random.split(key)
            ratio = jax.random.uniform(ratio_key, (rows, 1), minval=settings.low, maxval=settings.high)
            return masking.bernoulli(key, ratio, rows, length)

        return masking.behind_prompt(jax.vmap(draw)(jax.random.split(key, settings.pairs)), batch.prompt_length)

    def views(masked: jax.Array, batch: Batch) -> Views:
        in_view = common.count_in_view(masked[:, :, batch.prompt_length :])
        return common.coupled(masked, batch, batch.completion_length / in_view / (2 * masked.shape[0]))

    def score(reads: dict, views: Views) -> Scores:
        per_pair = common.weighted_sum(reads["log_prob"], views)
        total = jnp.sum(per_pair, axis=1)
        return Scores(total, total, {"spread": common.spread(per_pair * per_pair.shape[1])})

    def prepare(batch: Batch, old: Scores | None, ref: Scores | None) -> dict:
        (rows, length), size = batch.completion_mask.shape, batch.group_size
        reward = (batch.rewards if batch.advantages is None else batch.advantages) / settings.alpha
        # Without a reference or an old policy, the weights depend on the rewards alone.
        log_importance = 0.0 if old is None or ref is None else ref.guided - old.guided
        positive = common.group_softmax(log_importance + reward, size)
        negative = common.group_softmax(log_importance - reward, size)
        return {
            "weight": positive - settings.negative_weight * negative,
            "length": common.per_row(length, rows),
            "ref": None if ref is None else ref.normalised,
            "ess_positive": common.effective_share(positive, size),
            "ess_negative": common.effective_share(negative, size),
        }

    def objective(new: Scores, constants: dict) -> tuple[dict, dict]:
        length = constants["length"]
        metrics = {name: constants[name] for name in ("ess_positive", "ess_negative")}
        metrics |= {"score_spread": new.extra["spread"], "log_prob": new.guided / length}
        if constants["ref"] is not None:
            metrics["kl"] = common.k2(new.normalised, constants["ref"]) / length
        return {"objective": -constants["weight"] * new.guided / length}, metrics

    return Method(("log_prob",), masks, views, score, prepare, objective, needs_reference=True, old="always")
