"""TraFL, our reading of its abstract (arXiv 2605.13935): trajectory balance with the reward-tilted reference as target.

    loss = 1/B sum_i (log Z(c) + d_i - r_i / tau)^2,    d = (S_theta - S_ref) / L

over B rows; `c` is the prompt. In the abstract `Z` is learned. Here `log Z(c)` is the mean of `r / tau - d` over the
prompt's group, without gradient, which minimises the loss over `Z`: this is the log-variance loss (VarGrad, arXiv
2010.10436). The abstract does not say how `S` is estimated; here it is ESPO's bound, as in `gdsd_jax.methods.rspo`.
"""

from __future__ import annotations

import jax.numpy as jnp

from gdsd_jax.methods import common, rspo
from gdsd_jax.methods.method import Batch, Method, Scores


class Settings(rspo.Settings):
    """Settings of `trafl`, which are those of `rspo`."""


def make(settings: Settings) -> Method:
    def prepare(batch: Batch, old: Scores | None, ref: Scores | None, current: Scores) -> dict:
        rows = batch.tokens.shape[0]
        reference = jnp.zeros(rows) if ref is None else ref.normalised
        reward = (batch.rewards if batch.advantages is None else batch.advantages) / settings.tau
        log_z = common.group_mean(reward - (current.guided - reference), batch.group_size)
        return {"ref": reference, "target": reward - log_z, "weight": common.per_row(1 / rows, rows)}

    return rspo.bound_method(settings.views, prepare, current=True)
