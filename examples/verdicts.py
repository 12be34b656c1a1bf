"""GDSD that never makes a text likelier if the task's metric calls it wrong, however high its reward is.

    python -m gdsd_jax.train --config configs/tiny_sudoku.py --workdir runs/verdicts \
        --config.method=examples.verdicts:HONEST

Rewards often pay for a part of the answer or for its form. `batch.verdicts` holds the values of the task's metrics for
each text, and `batch.verdict_names` their names, in the order in which evaluations report them. A text that the last
metric calls wrong gets no positive advantage.
"""

import jax.numpy as jnp

from gdsd_jax.methods import Recipe, common
from gdsd_jax.methods.gdsd import Guidance, make


def make_honest(settings: Guidance):
    gdsd = make(settings)

    def prepare(batch, old, ref):
        advantages = common.advantages(batch, common.leave_one_out)
        right = batch.verdicts[:, -1] > 0
        advantages = jnp.where(right, advantages, jnp.minimum(advantages, 0))
        return gdsd.prepare(batch.replace(advantages=advantages), old, ref)

    return gdsd._replace(prepare=prepare, verdicts=True)


HONEST = Recipe(Guidance, make_honest)
