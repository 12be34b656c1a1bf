"""Settings of what follows a rollout: refilled batches, the reference, the optimizer, and supervised training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gdsd_jax.runtime.ranges import BelowOne, Count, Positive, Seed, Share


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Gradient clipping and AdamW, or another optimizer of optax.

    Attributes:
      learning_rate: its largest value.
      b1, b2, weight_decay: AdamW's own.
      clip_norm: largest norm of the gradient; longer ones are shortened to it.
      warmup_updates: updates over which the learning rate rises from zero.
      schedule: after the warm-up "constant", "linear" or "cosine" (both to zero at the last update).
      schedule_updates: updates over which it decays, warm-up included; None: those of the run as it was first started,
        so that a run which is extended later ends its schedule where it would have ended.
      name: `package.module:NAME` of a function that takes `learning_rate` and `settings`. `b1`, `b2` and
        `weight_decay` are AdamW's alone.
      settings: further arguments of that function.
    """

    learning_rate: float = 3e-6
    b1: BelowOne = 0.9
    b2: BelowOne = 0.99
    weight_decay: float = 0.01
    clip_norm: Positive = 0.2
    warmup_updates: int = 1
    schedule: str = "constant"
    schedule_updates: int | None = None
    name: str = "optax:adamw"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class RefillConfig:
    """Replaces groups that teach nothing, between reward and update, by groups of further prompts.

    Every round samples further prompts, until `prompts_per_iteration` groups are worth an update or no round is left.
    The batch has the same shape in any case: the best groups of all rounds, earlier ones first where they are equal.

    Attributes:
      rounds: largest number of further rounds in an iteration; 0: the batch is the rollout as it is.
      prompts: prompts of each further round; None: as many as `prompts_per_iteration`.
      select: decides which groups are worth an update. "spread": those whose rewards differ; or `package.module:NAME`
        of a function from `gdsd_jax.training.refill.Candidates` to one number for each group: groups above 0 are worth
        an update, and larger ones come first.
    """

    rounds: int = 0
    prompts: Count | None = None
    select: str = "spread"


@dataclasses.dataclass(frozen=True)
class ReferenceConfig:
    """The policy that a method's KL compares with, and the weight of that KL.

    The reference is the frozen base unless `every` is set. It is then a policy of its own, which starts as the trained
    one starts and moves after every so many iterations: `reference = decay * reference + (1 - decay) * policy`, number
    by number of what is trained.

    Attributes:
      every: iterations from one move of the reference to the next; 0: the frozen base.
      decay: what the reference keeps of itself in a move. With 0 it becomes the policy; 0.99 with `every=1` is an
        exponential moving average.
      kl_target: wanted value of the metric `policy/kl`. After each update the weight of the loss's KL is multiplied by
        `1 + kl_rate * clip(kl / kl_target - 1, -0.2, 0.2)` (arXiv 1909.08593, section 2.2); it starts at the `beta` of
        the method's settings. None: the weight is constant.
      kl_rate: see `kl_target`.
    """

    every: int = 0
    decay: BelowOne = 0.0
    kl_target: Positive | None = None
    kl_rate: Share = 0.1


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Supervised training: masked-diffusion cross-entropy, weighted 1/t.

    Attributes:
      seed: its own, so that runs of several seeds can share one start.
      path: file of demonstrations, prompts with completions or chats; None: the rows of the config's task.
      held_out: share of the demonstrations that is not trained on; their loss is `eval/loss`.
      careless: share of each demonstration that is wrong, in the way that the task says (`Task.careless`).
      until: stops early, once the task's last metric reaches this on `config.evaluation.count` validation rows; 0:
        never. Learning speed depends on rounding; stopping at a target accuracy makes starts comparable across
        machines.
      check_every: steps from one look at that metric, and at the loss of what is held out, to the next.
      steps: updates, if it does not stop early.
      batch_rows: rows of an update.
      packed_length: tokens of a row into which several demonstrations are packed, which do not see each other; None: a
        row for each. A packed answer ends with one EOS, so the model does not learn to fill the rest of a completion
        with EOS: use it for long texts, and finish without it.
      adapter: trains the adapter of `config.lora` instead of all parameters.
      microbatch_rows: rows of a micro-batch; None: all rows of an update at once.
      save_every: updates from one checkpoint to the next; SIGTERM writes one too.
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
