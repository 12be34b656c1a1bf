"""The contract of a method: the batch that it receives, and the functions that it consists of.

A method turns a rollout into a loss in five pure steps. Only `prepare` couples rows: group means, denominators and
softmaxes are computed there, from the whole batch and without gradient. `objective` is a sum over rows, so that cutting
it into micro-batches changes only the rounding. `gdsd_jax.methods.contract` checks a method against this contract.

B rows, G completions per group, M views, L completion tokens, T = P + L tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax

from gdsd_jax.diffusion import SamplerConfig
from gdsd_jax.diffusion.scoring import Views


@flax.struct.dataclass
class Batch:
    """Rollouts with their rewards, as methods receive them. The rows of a group are adjacent.

    Attributes:
      tokens: `[B, T]` int32, clean prompts and completions.
      prompt_mask: `[B, P]` bool, True on real tokens, or None where every token is attended to.
      completion_mask: `[B, L]` float32, 1 up to and including the first EOS.
      rewards: `[B]` float32, or None where `advantages` is given.
      advantages: `[B]` float32, or None where the method computes its own from the rewards.
      commit_step: `[B, L]` int32, the denoising step at which the sampler committed each token, or None.
      confidence: `[B, L]` float32, the probability of each token at that step, before temperature and cuts, or None.
      log_prob: `[B, L]` float32, the log-probability with which the sampler drew each token, after temperature and the
        cuts top_p and top_k, or None.
      entropy: `[B, L]` float32, the entropy in nats of the distribution from which `confidence` is read, or None.
      step_rewards: `[B, S]` float32, the rewards of S partial completions of each row, or None.
      components: `[B, C]` float32, the task's reward components (0 where one failed), or None.
      token_rewards: `[B, L]` float32, the rewards of the task's `token_score`, 0 after the EOS, or None.
      verdicts: `[B, V]` float32, the values of the task's metrics for each text (0 where one failed), or None if the
        method does not ask for them.
      iteration, inner_update: int32 scalars, counted from 0, or None outside of training.
      group_size: static, G.
      component_weights: static, `(name, weight)` of each component: `rewards` is their weighted sum.
      verdict_names: static, the names of the verdicts.
      eos_token_id: static, the token that ends a completion, or None where it is unknown.
      sampler: static, the settings that the completions were sampled with, or None.
      unwritten: static, the `commit_step` of positions that no step wrote; None: `sampler.step_limit`.
    """

    tokens: Any
    prompt_mask: Any
    completion_mask: Any
    rewards: Any = None
    advantages: Any = None
    commit_step: Any = None
    confidence: Any = None
    log_prob: Any = None
    entropy: Any = None
    step_rewards: Any = None
    components: Any = None
    token_rewards: Any = None
    verdicts: Any = None
    iteration: Any = None
    inner_update: Any = None
    component_weights: tuple[tuple[str, float], ...] = flax.struct.field(pytree_node=False, default=())
    verdict_names: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())
    group_size: int = flax.struct.field(pytree_node=False, default=1)
    eos_token_id: int | None = flax.struct.field(pytree_node=False, default=None)
    sampler: SamplerConfig | None = flax.struct.field(pytree_node=False, default=None)
    unwritten: int | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def step_limit(self) -> int:
        """Returns the largest number of steps of the sampler; it is the `commit_step` of positions that none wrote."""
        if self.unwritten is not None:
            return self.unwritten
        assert self.sampler is not None, "a batch that records steps names its sampler"
        return self.sampler.step_limit

    @property
    def completion_length(self) -> int:
        return self.completion_mask.shape[1]

    @property
    def prompt_length(self) -> int:
        return self.tokens.shape[1] - self.completion_length


class Scores(NamedTuple):
    """The values that an objective compares between policies; all arrays have rows first.

    guided: the quantity that the method moves away from its value under the old policy.
    normalised: the log-probabilities that the KL to the reference compares.
    extra: further values that the objective needs from the views, such as weights of tokens and diagnostics, as a
      dictionary; or None. Only the new policy's are read.
    """

    guided: Any
    normalised: Any
    extra: Any = None


class Method(NamedTuple):
    """An objective as functions. `gdsd_jax.methods.METHODS` lists them; the trainer never asks which one it runs.

    reads: the per-token quantities that the method needs, see `gdsd_jax.diffusion.scoring.read_tokens`.
    masks: `(key, batch) -> masked [M, B, T]`, drawn once per inner update; old, reference and new scores share them.
      Both `masks` and `prepare` may use `batch.iteration` and `batch.inner_update`.
    views: `(masked, batch) -> Views`; adds to the masks what follows from them, such as complements and weights.
    score: `({read: [R, B, L]}, views) -> Scores`; the read "hidden" is `[R, B, L, D]`.
    prepare: `(batch, old Scores | None, ref Scores | None) -> constants`, a pytree of arrays with rows first. With
      `current` it takes a fourth argument, the detached scores of the policy as it is before this inner update.
    objective: `(new Scores, constants) -> ({component: [B]}, {metric: [B]})`. The loss is the sum over components and
      rows; components are named ("objective", "kl"), so that the gradient of each can be measured. Metrics are averaged
      over rows; of names that end in `_max` the largest value is taken, of those in `_std` the standard deviation. If
      the constants hold no old scores, `objective` uses the stop-gradient of the new ones, which is exact at the first
      inner update after a rollout.
    needs_reference: whether `prepare` uses the reference's scores.
    old: "unused" (no old policy), "ratio" (old scores are only compared with new ones, so the first inner update needs
      no forward pass for them), "always" (`prepare` couples rows through them), or "own_masks" (as "always", but the
      old scores are read on masks of their own, drawn once for all inner updates of a rollout).
    current: whether `prepare` couples rows through the scores of the policy that is being updated.
    records: whether the batch must hold the rollout's `log_prob` and `entropy`.
    extras: `(key, DenoiserConfig) -> pytree of arrays`, the initial values of parameters that the method trains beside
      the policy, such as a value head, with `config.extras_optimizer`; None: there are none. `score` takes them as a
      third argument: old scores get those of the rollout's policy, new and reference scores the current ones. Their
      gradient flows through the new scores alone.
    verdicts: whether the batch must hold the task's verdicts.
    """

    reads: tuple
    masks: Callable
    views: Callable
    score: Callable
    prepare: Callable
    objective: Callable
    needs_reference: bool
    old: str = "ratio"
    current: bool = False
    records: bool = False
    extras: Callable | None = None
    verdicts: bool = False

    def scores(self, reads: dict, views: Views, extras: Any = None) -> Scores:
        """Calls `score` with the extras, if the method has any."""
        return self.score(reads, views) if self.extras is None else self.score(reads, views, extras)

    def constants(self, batch: Batch, old: Scores | None, ref: Scores | None, current: Scores | None) -> Any:
        """Calls `prepare` with the scores that it takes; no gradient flows through the result."""
        scores = (old, ref, current) if self.current else (old, ref)
        return jax.lax.stop_gradient(self.prepare(batch, *jax.lax.stop_gradient(scores)))
