"""GDSD on a task with several rewards, each normalised inside its group before they are added up.

    python -m gdsd_jax.train --config configs/tiny_sudoku.py --workdir runs/components \
        --config.method=examples.component_advantages:BY_COMPONENT

Otherwise a component with a large spread would dominate the others (GDPO, arXiv 2601.05242). `batch.components` holds
the values of all components, `batch.component_weights` their names and weights.
"""

from gdsd_jax.methods import Recipe, common
from gdsd_jax.methods.gdsd import Guidance, make


def make_by_component(settings: Guidance):
    gdsd = make(settings)

    def prepare(batch, old, ref):
        advantages = common.by_component(batch, common.standardised)
        return gdsd.prepare(batch.replace(advantages=advantages), old, ref)

    return gdsd._replace(prepare=prepare)


BY_COMPONENT = Recipe(Guidance, make_by_component)
