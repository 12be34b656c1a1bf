"""wd1, weighted policy optimisation without a ratio (arXiv 2507.08838).

    loss = - sum_i w+_i sum_k c_ik l_ik  +  sum_i w-_i sum_k c_ik l_ik,    w+ = softmax(A),  w- = softmax(-A)

over rows i and completion tokens k, with the completion mask `c` and softmaxes over each group. `l_ik` is read in one
view that masks the whole completion, and prompt tokens with probability 0.15, as in diffu-GRPO. `A` is the reward minus
its group mean. There is no old policy and no reference. The authors' code takes the softmax over the batch of a device,
which is the same if that batch is one group. `positive_only` drops the second sum.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from gdsd_jax.diffusion.scoring import Views
from gdsd_jax.methods import common
from gdsd_jax.methods.method import Batch, Method, Scores
from gdsd_jax.runtime.ranges import Share


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of `wd1`.

    Attributes:
      positive_only: leave out the sum over `w-`.
      prompt_mask_rate: probability that a prompt token is masked.
    """

    positive_only: bool = False
    prompt_mask_rate: Share = 0.15


def make(settings: Settings) -> Method:
    def score(reads: dict, views: Views) -> Scores:
        log_prob = jnp.sum(views.weights * reads["log_prob"], axis=0)
        return Scores(log_prob, log_prob)

    def prepare(batch: Batch, old: Scores | None, ref: Scores | None) -> dict:
        advantage, size = common.advantages(batch, common.centred), batch.group_size
        positive, negative = common.group_softmax(advantage, size), common.group_softmax(-advantage, size)
        return {
            "weight": positive if settings.positive_only else positive - negative,
            "completion_mask": batch.completion_mask,
            "ess_positive": common.effective_share(positive, size),
            "ess_negative": common.effective_share(negative, size),
        }

    def objective(new: Scores, constants: dict) -> tuple[dict, dict]:
        score = jnp.sum(constants["completion_mask"] * new.guided, axis=1)
        length = jnp.maximum(jnp.sum(constants["completion_mask"], axis=1), 1)
        metrics = {name: constants[name] for name in ("ess_positive", "ess_negative")}
        return {"objective": -constants["weight"] * score}, {**metrics, "log_prob": score / length}

    masks = common.whole_completion(settings.prompt_mask_rate)
    return Method(
        ("log_prob",), masks, common.averaged_views, score, prepare, objective, needs_reference=False, old="unused"
    )
