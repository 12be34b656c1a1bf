"""StableDRL, SPG with self-normalised importance weights (arXiv 2603.06743).

    w_i  = softmax over the group of min(ELBO_i - ELBO_old_i, log clip),  without gradient
    loss = - 1/N sum_i w_i A_i L~_i

over the rows i of N groups; `L~`, `ELBO` and the views are those of SPG (`gdsd_jax.methods.spg`). `ELBO` is a mean per
token, so that `w` stays near 1/G. The old policy is scored on masks of its own, drawn once for all updates of a
rollout, whose noise enters `w`. There is no lower clip. `A` is the reward minus its group mean. Without `importance`,
the loss is that of SPG.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from gdsd_jax.methods import common, spg
from gdsd_jax.methods.method import Batch, Method, Scores
from gdsd_jax.runtime.ranges import Positive


@dataclasses.dataclass(frozen=True)
class Settings(spg.Settings):
    """Settings of `stable_drl`, which has those of SPG too.

    Attributes:
      clip: the largest importance ratio.
      importance: weight rows by their importance ratios; without these weights the loss is that of SPG.
    """

    clip: Positive = 5.0
    importance: bool = True


def make(settings: Settings) -> Method:
    plain = spg.make(settings)
    if not settings.importance:
        return plain

    def prepare(batch: Batch, old: Scores | None, ref: Scores | None, current: Scores) -> dict:
        size, rows = batch.group_size, batch.tokens.shape[0]
        gain = jnp.minimum(current.normalised - old.normalised, math.log(settings.clip))
        weight = common.group_softmax(gain, size)
        advantage = common.advantages(batch, common.centred)
        return {"weight": weight * advantage * size / rows, "ess": common.effective_share(weight, size)}

    def objective(new: Scores, constants: dict) -> tuple[dict, dict]:
        losses, metrics = plain.objective(new, constants)
        return losses, metrics | {"effective_share": constants["ess"]}

    return plain._replace(prepare=prepare, objective=objective, old="own_masks", current=True)
