"""A policy gradient whose baseline is a value head on the hidden states, trained beside the adapter.

    python -m gdsd_jax.train --config configs/tiny_sudoku.py --workdir runs/value \
        --config.method=examples.value_head:CRITIC --config.extras_optimizer.learning_rate=1e-2

The head predicts the reward of a completion from the denoiser's hidden states with some tokens masked. Advantages are
rewards minus that prediction, so no group of completions is needed for a baseline:

    v_i  = w . mean of the hidden states h_ik of the row's tokens + b
    loss = - sum_i (r_i - v_old_i) S_i / (B L)  +  1/2 sum_i (v_i - r_i)^2 / B

`v_old` is the value under the policy that made the rollout, the same in all inner updates. The head starts at 0, and
its error has no gradient in the policy. It is saved and resumed with the run, and has an optimizer of its own.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gdsd_jax.methods import Method, Recipe, Scores, common


@dataclasses.dataclass(frozen=True)
class Settings:
    """`views`: masked pairs per row and inner update."""

    views: int = 1


def make(settings: Settings) -> Method:
    def extras(key, model):
        return {"w": jnp.zeros(model.hidden_size), "b": jnp.zeros(())}

    def views(masked, batch):
        return common.coupled_views(masked, batch, weighted=False)

    def score(reads, views, head):
        state = jax.lax.stop_gradient(jnp.mean(reads["hidden"], axis=(0, 2)))
        log_prob = common.weighted_sum(reads["log_prob"], views)
        return Scores(log_prob, log_prob, {"value": state @ head["w"] + head["b"]})

    def prepare(batch, old, ref):
        rows, length = batch.completion_mask.shape
        return {
            "reward": batch.rewards,
            "advantage": batch.rewards - old.extra["value"],
            "rows": common.per_row(rows, rows),
            "length": common.per_row(length, rows),
        }

    def objective(new, constants):
        rows, error = constants["rows"], new.extra["value"] - constants["reward"]
        per_token = jnp.mean(new.guided, axis=1) / constants["length"]
        losses = {"objective": -constants["advantage"] * per_token / rows, "value": 0.5 * error**2 / rows}
        return losses, {"value_error": jnp.abs(error), "advantage": jnp.abs(constants["advantage"])}

    reads, masks = ("log_prob", "hidden"), common.stratified_masks(settings.views)
    # Advantages need the values of the policy that made the rollout, so that the old scores are always computed.
    return Method(reads, masks, views, score, prepare, objective, needs_reference=False, old="always", extras=extras)


CRITIC = Recipe(Settings, make)
