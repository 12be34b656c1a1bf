"""EGSPO, policy gradients on the rollout's steps of highest entropy, and its stepwise advantages (arXiv 2603.12554).

    loss = 1/(B S n) sum_{i,j} [ -min(r_ij A_ij, clip(r_ij) A_ij) + beta k3(q_ij) ],    r = exp(q_theta - q_rollout)

over rows i and S slots j. The slots of a row are its steps of highest mean entropy, the highest first. `q` sums the
log-probabilities, without temperature, of the tokens that the step committed, in the state before it. `n` is the number
of tokens per step. With `mean`, `q` is a mean over tokens and `n` is 1. The authors update on one slot after another
(`slot`); here an update averages over all slots. `A` is a return minus its group mean. The return is the reward, or in
EGSPO-SA (lambda = `stepwise` > 0)

    ret_ij = (R_i + lambda (R_i - r_ij)) / (1 + lambda)

where `r_ij` is the reward of the completion that the policy would have written in one step in place of step j. It comes
from `Batch.step_rewards`, which `gdsd_jax.train` cannot give, because a task rewards whole completions.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from gdsd_jax.diffusion.trajectory import StepViews
from gdsd_jax.methods import common, steps
from gdsd_jax.methods.method import Batch, Method, Scores
from gdsd_jax.runtime.ranges import Bound, Count, Few


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of `egspo`.

    Attributes:
      eps_low, eps_high: trust region on the ratio of each slot.
      beta: weight of the KL to the reference.
      slots: steps of highest entropy per row, S.
      slot: the only slot to use; None: all.
      stepwise: lambda, the weight of stepwise rewards in the returns.
      mean: average the log-probabilities of a step's tokens instead of summing them.
      at_once: steps that share a forward pass.
    """

    eps_low: Bound = 0.2
    eps_high: Bound = 0.5
    beta: float = 0.04
    slots: Few = 8
    slot: int | None = None
    stepwise: float = 0.0
    mean: bool = False
    at_once: Count = 8

    def __post_init__(self):
        inside = self.slot is None or 0 <= self.slot < self.slots
        common.require(inside, f"slot {self.slot} is not one of the {self.slots} slots")


def make(settings: Settings) -> Method:
    def masks(key: jax.Array, batch: Batch) -> jax.Array:
        steps.of_batch(batch, "egspo", "entropy")
        total, tokens = steps.by_step(batch.entropy, batch, batch.step_limit)
        mean = jnp.where(tokens > 0, total / jnp.maximum(tokens, 1), -1.0)
        chosen = jnp.argsort(-mean, axis=1, stable=True)[:, : settings.slots]
        if settings.slot is not None:
            chosen = chosen[:, settings.slot : settings.slot + 1]
        return steps.masks_before(batch, chosen.T)

    def views(masked: jax.Array, batch: Batch) -> StepViews:
        steps.of_batch(batch, "egspo")
        return steps.views_before(masked, batch, at_once=settings.at_once)

    def summed(values: jax.Array, committed: jax.Array) -> jax.Array:
        total = jnp.sum(jnp.where(committed > 0, values, 0.0), axis=-1)
        return total / jnp.maximum(jnp.sum(committed, axis=-1), 1) if settings.mean else total

    def score(reads: dict, views: StepViews) -> Scores:
        committed = jnp.swapaxes(views.weights, 0, 1)
        q = summed(jnp.swapaxes(reads["log_prob"], 0, 1), committed)
        return Scores(q, q, {"committed": committed})

    def slot_advantages(batch: Batch) -> jax.Array:
        """Returns advantages `[B, 1]`, or `[B, S]` if each slot has a reward of its own."""
        if batch.advantages is not None or not settings.stepwise:
            return common.advantages(batch, common.centred)[:, None]
        common.require(batch.step_rewards is not None, "stepwise needs step_rewards, which the trainer cannot give")
        own = slice(None) if settings.slot is None else slice(settings.slot, settings.slot + 1)
        whole, part = batch.rewards[:, None], batch.step_rewards[:, own]
        returns = (whole + settings.stepwise * (whole - part)) / (1 + settings.stepwise)
        groups = returns.reshape(-1, batch.group_size, returns.shape[1])
        return (groups - jnp.mean(groups, axis=1, keepdims=True)).reshape(returns.shape)

    def prepare(batch: Batch, old: Scores | None, ref: Scores | None) -> dict:
        steps.of_batch(batch, "egspo", "confidence")
        rows, sampler = batch.tokens.shape[0], batch.sampler
        per_step = 1.0 if settings.mean else batch.completion_length / (sampler.blocks * sampler.steps_per_block)
        return {
            "advantage": slot_advantages(batch),
            "old": jnp.log(batch.confidence),
            "ref": ref.normalised if ref is not None and settings.beta else None,
            "denominator": common.per_row(rows * per_step, rows),
        }

    def objective(new: Scores, constants: dict) -> tuple[dict, dict]:
        committed, q = new.extra["committed"], new.guided
        old = summed(constants["old"][:, None], committed)
        log_ratio = q - old
        policy, clipped = common.ppo(log_ratio, constants["advantage"], settings.eps_low, settings.eps_high)
        metrics = common.ratio_metrics(log_ratio, clipped)
        losses = {"objective": jnp.mean(policy, axis=1) / constants["denominator"]}
        if constants["ref"] is not None:
            metrics["kl"] = common.k3(q, constants["ref"])
            losses["kl"] = settings.beta * jnp.mean(metrics["kl"], axis=1) / constants["denominator"]
        return losses, {name: jnp.mean(x, axis=1) for name, x in metrics.items()}

    return Method(
        ("log_prob",), masks, views, score, prepare, objective,
        needs_reference=settings.beta > 0, old="unused", records=True,
    )  # fmt: skip
