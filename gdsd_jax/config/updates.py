"""Defines the settings of the optimizer, of refilled batches, of the reference policy and of supervised training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gdsd_jax.runtime.ranges import BelowOne, Count, Positive, Seed, Share


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Sets gradient clipping and the optimizer: AdamW, or another one of optax.

    Attributes:
      learning_rate: the rate after the warm-up, before the schedule lowers it.
      b1, b2, weight_decay: arguments of AdamW; other optimizers ignore them.
      clip_norm: largest norm of the gradient; a longer gradient is scaled down to it.
      warmup_updates: updates over which the learning rate rises linearly.
      schedule: the rate after the warm-up: "constant", or "linear" or "cosine", which reach zero at the last update.
      schedule_updates: update at which the schedule ends, counted from the start of the warm-up; None: the last update
        of the run as it was first started, so that extending a run does not stretch its schedule.
      name: `package.module:NAME` of a function that takes `learning_rate` and `settings` and returns the optimizer.
      settings: further arguments of that function.
    """

    learning_rate: float = 3e-6
    b1: BelowOne = 0.9
    b2: BelowOne = 0.99
    weight_decay: float = 0.01
    clip_norm: Positive = 0.2
    warmup_updates: int = 1
    schedule: str = "constant"
    schedule_updates: Count | None = None
    name: str = "optax:adamw"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class RefillConfig:
    """Replaces groups that teach nothing by groups of further prompts, after the rewards and before the update.

    Every round samples further prompts, until `prompts_per_iteration` groups are worth an update or no round is left.
    The shape of the batch stays the same: it holds the best groups of all rounds, and earlier ones among equals.

    Attributes:
      rounds: largest number of further rounds in an iteration; 0: the batch is the rollout as it is.
      prompts: prompts of each further round; None: as many as `prompts_per_iteration`.
      revisit: probability that a prompt is asked again after its group was not worth an update. After n such groups in
        succession it is asked with probability `revisit ** n`; otherwise it is skipped before anything is sampled, and
        the next prompt takes its place. 1: no prompt is skipped; 0: none is asked again unless all others are used up.
        It also works with `rounds=0`.
      select: decides which groups are worth an update. "spread" takes those whose rewards differ. `package.module:NAME`
        names a function from `gdsd_jax.training.refill.Candidates` to one number per group: groups above 0 are worth
        an update, and groups with larger numbers come first.
    """

    rounds: int = 0
    prompts: Count | None = None
    revisit: Share = 1.0
    select: str = "spread"

    @property
    def selects(self) -> bool:
        """Returns whether groups are judged at all."""
        return self.rounds > 0 or self.revisit < 1


@dataclasses.dataclass(frozen=True)
class ReferenceConfig:
    """Sets the policy that a method's KL compares with, and the weight of that KL.

    The reference is the frozen base unless `every` is above 0. It is then a policy of its own, which starts equal to
    the trained policy. Every so many iterations its parameters move towards those of the policy:
    `reference = decay * reference + (1 - decay) * policy`.

    Attributes:
      every: iterations between moves of the reference; 0: the reference is the frozen base.
      decay: weight of the old reference in a move. 0 sets the reference to the policy; 0.99 with `every=1` is an
        exponential moving average.
      kl_target: target of the metric `policy/kl`. After each update the weight of the KL in the loss is multiplied by
        `1 + kl_rate * clip(kl / kl_target - 1, -0.2, 0.2)` (arXiv 1909.08593, section 2.2), starting from the `beta` of
        the method's settings. None: the weight is constant.
      kl_rate: rate of that adaptation, see `kl_target`.
    """

    every: int = 0
    decay: BelowOne = 0.0
    kl_target: Positive | None = None
    kl_rate: Share = 0.1


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Sets up supervised training with the masked-diffusion cross-entropy, weighted 1/t.

    Attributes:
      seed: seed of supervised training, apart from `config.seed` so that runs of several seeds can share one start.
      path: file of demonstrations, either prompts with completions or chats; None: the rows of the config's task.
      held_out: share of the demonstrations that is not trained on; `eval/loss` is their loss.
      careless: share of each demonstration that is made wrong, in the way that the task defines (`Task.careless`).
      until: stops training once the task's last metric reaches this value on `config.evaluation.count` validation rows;
        0: never. Learning speed depends on rounding; stopping at a target accuracy makes starts comparable across
        machines.
      check_every: updates between checks of that metric and of the held-out loss.
      steps: number of updates, unless `until` stops training earlier.
      batch_rows: rows of an update.
      packed_length: tokens of a row that packs several demonstrations, which do not attend to each other; None: one
        demonstration per row. A packed answer ends with a single EOS, so the model does not learn to fill the rest of a
        completion with EOS: pack long texts, and finish training without packing.
      adapter: whether to train the adapter of `config.lora` instead of all parameters.
      microbatch_rows: rows of a micro-batch; None: all rows of an update at once.
      save_every: updates between checkpoints; SIGTERM writes one too.
    """

    seed: Seed = 0
    path: str | None = None
    held_out: BelowOne = 0.0
    adapter: bool = False
    microbatch_rows: Count | None = None
    packed_length: Count | None = None
    save_every: Count = 500
    careless: Share = 0.0
    until: Share = 0.0
    check_every: Count = 50
    steps: Count = 1000
    batch_rows: Count = 64
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=1e-3, clip_norm=1.0, warmup_updates=50, schedule="cosine"
    )
