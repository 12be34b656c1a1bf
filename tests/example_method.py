"""The method of docs/new_method.md: GDSD with Huber's loss in place of the square.

    delta = (S_theta - S_old) / L - psi A
    loss  = sum_{i,m} h(delta_im) / B,    h(x) = x^2 / 2 where |x| <= width, else width (|x| - width / 2)

over rows i and views m. The gradient of a residual beyond `width` is constant instead of growing with it.
"""

import dataclasses

import jax.numpy as jnp

from gdsd_jax.methods import Method, Recipe, Scores, common


@dataclasses.dataclass(frozen=True)
class Huber:
    psi: float = 1.0
    width: float = 0.1
    views: int = 2


def make(settings):
    def views(masked, batch):
        return common.coupled_views(masked, batch, weighted=True)

    def score(reads, views):
        S = common.weighted_sum(reads["log_prob"], views)
        return Scores(guided=S, normalised=S)

    def prepare(batch, old, ref):
        rows, length = batch.completion_mask.shape
        return {
            "A": common.advantages(batch, common.leave_one_out),
            "old": None if old is None else old.guided,
            "L": common.per_row(length, rows),
            "B": common.per_row(rows, rows),
        }

    def objective(new, constants):
        A, L, B = constants["A"][:, None], constants["L"][:, None], constants["B"]
        delta = (new.guided - common.old_or_new(constants["old"], new.guided)) / L - settings.psi * A
        size, width = jnp.abs(delta), settings.width
        huber = jnp.where(size <= width, delta**2 / 2, width * (size - width / 2))
        return {"objective": jnp.sum(huber, axis=1) / B}, {"linear": jnp.mean(size > width, axis=1)}

    masks = common.stratified_masks(settings.views)
    return Method(("log_prob",), masks, views, score, prepare, objective, needs_reference=False)


HUBER = Recipe(Huber, make)
