"""GDSD that raises no text of which the task says that it is wrong, however well its reward components score it.

    python -m gdsd_jax.train --config configs/tiny_sudoku.py --workdir runs/verdicts \
        --config.method=examples.verdicts:HONEST

Rewards often pay for a part of the answer or for its form. `batch.verdicts` holds what the task's metrics say of each
text, `batch.verdict_names` their names, in the order in which evaluations report them. A text that the last
of them calls wrong gets no positive advantage.
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
