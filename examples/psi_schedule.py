"""GDSD whose guidance grows with the iterations: a schedule inside a method.

    python -m gdsd_jax.train --config configs/tiny_sudoku.py --workdir runs/schedule \
        --config.method=examples.psi_schedule:SCHEDULED

`batch.iteration` and `batch.inner_update` say where the run is. GDSD's loss depends on the product `psi A` alone, so a
schedule of psi is a factor of the advantages.
"""

import dataclasses

import jax.numpy as jnp

from gdsd_jax.methods import Recipe, common
from gdsd_jax.methods.gdsd import Guidance, make


@dataclasses.dataclass(frozen=True)
class Scheduled(Guidance):
    """Settings of `gdsd`; psi grows from a tenth of `psi` to `psi` over the first `grow_over` iterations."""

    psi: float = 1.0
    grow_over: int = 10


def make_scheduled(settings: Scheduled):
    gdsd = make(settings)

    def prepare(batch, old, ref):
        share = 0.1 + 0.9 * jnp.minimum(batch.iteration / settings.grow_over, 1.0)
        advantages = share * common.advantages(batch, common.leave_one_out)
        return gdsd.prepare(batch.replace(advantages=advantages), old, ref)

    return gdsd._replace(prepare=prepare)


SCHEDULED = Recipe(Scheduled, make_scheduled)
