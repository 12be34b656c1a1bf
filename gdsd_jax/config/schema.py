"""Defines the settings of a run, `TrainConfig`, and of its parts. The range of a number is part of its annotation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gdsd_jax.config.updates import OptimizerConfig, ReferenceConfig, RefillConfig, SFTConfig
from gdsd_jax.denoiser import TARGETS
from gdsd_jax.diffusion import SamplerConfig
from gdsd_jax.runtime import ranges
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.hosts import HostsConfig
from gdsd_jax.runtime.ranges import BelowOne, Count, Positive, Seed
from gdsd_jax.runtime.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sets how the denoiser computes; its sizes come from the checkpoint. See `gdsd_jax.denoiser.DenoiserConfig`.

    Attributes:
      dtype: dtype of the computation, "bfloat16" or "float32"; log-normalisers, sums, RoPE and the optimizer are always
        float32.
      weights: "stored" uses the checkpoint's weights as they are; "int8" keeps the frozen matrices of the layers in 8
        bits, with one scale per output channel, during rollouts, scores and updates of adapters. Supervised training
        and exports use the stored weights in both cases.
      remat: what the backward pass recomputes: "none" keeps all activations, "dots" keeps the outputs of matrix
        products, "full" keeps only the inputs of layers; "auto" takes the first of these that fits the devices.
      attention: "plain", "splash" (TPUs), "cudnn" (NVIDIA GPUs), or "auto", which chooses by the device.
      layer_unroll: layers per iteration of the compiled loop over layers.
      vocab_chunk: vocabulary entries whose logits are in memory at a time.
    """

    dtype: str = "bfloat16"
    weights: str = "stored"
    remat: str = "full"
    attention: str = "auto"
    layer_unroll: Count = 1
    vocab_chunk: Count = 16384


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Sets up the low-rank adapters (LoRA).

    Attributes:
      rank: rank of each adapter; 0 trains all parameters instead.
      alpha: scale; an adapter's product is multiplied by `alpha / rank`.
      targets: matrices that get an adapter.
      dropout: share of an adapter's inputs that is dropped; it applies only to updates of the policy.
    """

    rank: int = 128
    alpha: Positive = 64.0
    targets: tuple[str, ...] = TARGETS
    dropout: BelowOne = 0.05

    def __post_init__(self) -> None:
        distinct = set(self.targets)
        if not distinct or len(distinct) < len(self.targets) or distinct - set(TARGETS):
            raise UserError(f"config.lora.targets {self.targets} must be distinct names out of {', '.join(TARGETS)}")


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Chooses the task, which gives prompts, rewards and metrics, and its rows.

    A task that takes its validation rows out of its training set also takes them out of `train_path`, unless
    `validation_path` is set.

    Attributes:
      name: name of a task of the package, or `package.module:NAME`.
      grader: decides what counts as right, in rewards and metrics: "robust", or "public", which gives the public
        trainers' rewards and the papers' metrics number for number.
      train_path, validation_path: local files of rows; None: the task's own rows.
      eval_path: local file of the test rows; None: the task's own.
      train_rows: number of training rows; None: all of them.
      settings: overrides fields of the task: `template`, `system`, `assistant_prefix`, `answer_template`, `examples`,
        `shots`, `weights`.
    """

    name: str = "sudoku"
    grader: str = "robust"
    train_path: str | None = None
    validation_path: str | None = None
    eval_path: str | None = None
    train_rows: Count | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def path(self, split: str) -> str | None:
        """Returns the path of a split's local file, or None if the config names no file."""
        return {"train": self.train_path, "validation": self.validation_path, "test": self.eval_path}.get(split)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Sets up evaluations, at temperature 0 with the rollout's strategy and blocks; the defaults are the papers'.

    The rollout's threshold, factor and cache are left out.

    Attributes:
      steps: denoising steps of a completion of the rollout's length; other lengths take steps in proportion. None: one
        step for every two tokens.
      evaluation_prompt: whether to use the task's evaluation prompt instead of its training prompt.
      batch_rows: completions sampled at a time; raise it to what the memory holds. At temperature 0 the results do not
        depend on it, except `kl`, whose masks are drawn for each batch.
      lengths: completion lengths of `gdsd_jax.evaluate`. Evaluations during training use the rollout's length.
      every: iterations between evaluations during training; 0: only at the end.
      split: split on which the run is evaluated during training.
      count: number of its rows; None: all of them.
      best: metric by which the best checkpoint is kept, if `every` is above 0; None: the task's last metric.
    """

    steps: Count | None = None
    evaluation_prompt: bool = True
    batch_rows: Count = 64
    lengths: tuple[Count, ...] = (128, 256, 512)
    every: int = 0
    split: str = "validation"
    count: Count | None = None
    best: str | None = None


@dataclasses.dataclass(frozen=True)
class CheckpointOverrides:
    """Sets or replaces fields of a checkpoint's `config.json` that its files lack or state wrongly; None keeps a field.

    Attributes:
      mask_token_id, eos_token_id, pad_token_id: token ids.
      block_size: tokens of a block of block-causal attention.
    """

    mask_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    block_size: int | None = None


@dataclasses.dataclass(frozen=True)
class TinyConfig:
    """Describes the embedded model, a tiny model that is made on first use.

    If `family` is set, a `config.checkpoint` that does not exist yet is made from random weights, which `gdsd_jax.sft`
    then trains.

    Attributes:
      family: model family whose format the checkpoint has, a key of `gdsd_jax.families.FAMILIES`; empty: there is no
        embedded model, and the checkpoint must exist.
      hidden_size, num_layers, num_heads, intermediate_size: sizes of the model.
      num_kv_heads: heads of keys and values; None: as many as of queries.
      block_size: tokens of a block of block-causal attention; None: every token attends to every other.
    """

    family: str = ""
    hidden_size: Count = 64
    num_layers: Count = 3
    num_heads: Count = 4
    num_kv_heads: Count | None = None
    intermediate_size: Count = 192
    block_size: Count | None = None


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Holds every setting of a run.

    An iteration has `prompts_per_iteration * group_size` rows.

    Attributes:
      checkpoint: Hugging Face directory of the base model.
      checkpoint_overrides: fields to set or replace in the checkpoint's `config.json`.
      refill: replaces groups that teach nothing by groups of further prompts.
      reference: the policy that a method's KL compares with.
      extras_optimizer: the optimizer of what a method trains beside the policy (`gdsd_jax.methods.Method.extras`).
      mesh: arrangement of the devices, see `gdsd_jax.runtime.sharding`.
      hosts: the processes that hold the devices, see `gdsd_jax.runtime.hosts`.
      method: name of the method, or `package.module:NAME`.
      settings: settings of methods, by the method's name.
      seed: seed of prompts, rollouts, masks and adapters.
      iterations: number of iterations, each of which samples one rollout and updates the policy on it.
      prompts_per_iteration: prompts of a rollout, each of which gets one group of completions.
      group_size: completions of each prompt.
      inner_updates: optimizer steps on each rollout.
      update_rows: rows of an optimizer step, a whole number of groups; None: all rows of the rollout. The steps of an
        iteration take one part of the rollout after the other; every pass over it draws a new order of the groups.
      rollout_rows: rows that are sampled at a time, a whole number of groups; None: as many as fit the devices
        according to `gdsd_jax.training.fit`. It changes no draw. The rewards of one part are computed while the next
        part is sampled.
      microbatch_rows: rows per gradient accumulation step; None: chosen like `rollout_rows`.
      component_norms_every: logs the gradient norm of each component of the loss (`grad/objective`, `grad/kl`) every so
        many iterations; 0: never. These iterations run a program of their own; if the loss has two components, it takes
        a second backward pass and holds a second gradient. `grad/norm` is already the norm of a loss of one component.
      eos_token_id: the only token id that ends a completion; None: the tokenizer's EOS and every other id that ends a
        turn.
      prompt_buckets: lengths that prompts are left-padded to.
      special_tokens_in_text: whether special tokens that are spelled out in prompts, in answers of a task or by a user
        are read as special tokens. Otherwise they are ordinary text, and only chat templates make special tokens.
      adapter_base: what happens if an adapter records another base than the checkpoint. "fingerprint" refuses another
        fingerprint and warns of another name; "strict" refuses both; "any" warns of both.
      overlong_prompts: what happens to a prompt that exceeds the largest bucket: "error", or "keep_last", which keeps
        the last tokens that fit.
      save_every: iterations between checkpoints.
      keep: number of newest checkpoints that are kept.
      completions_logged: completions of each iteration that are written to `completions.jsonl`.
      trackers: further places that metrics go to: "tensorboard", "wandb", or `package.module:NAME`, see
        `gdsd_jax.telemetry.trackers`.
      tensorboard, wandb: True adds the tracker of this name.
      profile: iteration whose timeline is recorded, see `gdsd_jax.telemetry.profile`; 0: none.
      dry_run: whether to run only one iteration, on a tiny model, see `gdsd_jax.training.dry_run`.
    """

    checkpoint: str
    task: TaskConfig
    model: ModelConfig
    lora: LoRAConfig
    optimizer: OptimizerConfig
    sampler: SamplerConfig
    evaluation: EvalConfig
    sft: SFTConfig
    tiny: TinyConfig
    refill: RefillConfig = RefillConfig()
    reference: ReferenceConfig = ReferenceConfig()
    extras_optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=1e-3, weight_decay=0.0, clip_norm=1.0, warmup_updates=0
    )
    checkpoint_overrides: CheckpointOverrides = CheckpointOverrides()
    mesh: MeshConfig = MeshConfig()
    hosts: HostsConfig = HostsConfig()
    method: str = "gdsd"
    settings: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    seed: Seed = 42
    iterations: Count = 1000
    prompts_per_iteration: Count = 20
    group_size: int = 16
    inner_updates: Count = 8
    update_rows: Count | None = None
    rollout_rows: Count | None = None
    microbatch_rows: Count | None = 16
    component_norms_every: int = 0
    eos_token_id: int | None = None
    prompt_buckets: tuple[Count, ...] = (400,)
    special_tokens_in_text: bool = False
    adapter_base: str = "fingerprint"
    overlong_prompts: str = "keep_last"
    save_every: Count = 100
    keep: Count = 2
    completions_logged: int = 8
    trackers: tuple[str, ...] = ()
    tensorboard: bool = False
    wandb: bool = False
    profile: int = 0
    dry_run: bool = False

    def __post_init__(self):
        ranges.check(self, "config")
        rows = self.prompts_per_iteration * self.group_size
        if self.group_size < 2:
            raise UserError(f"config.group_size {self.group_size}: an advantage compares completions, set at least 2")
        for name, lengths in (("prompt_buckets", self.prompt_buckets), ("evaluation.lengths", self.evaluation.lengths)):
            if not lengths:
                raise UserError(f"config.{name} is empty: give at least one length")
        if self.rollout_rows and (rows % self.rollout_rows or self.rollout_rows % self.group_size):
            raise UserError(
                f"config.rollout_rows {self.rollout_rows} is no multiple of config.group_size {self.group_size} that "
                f"divides the {rows} rows of an iteration (prompts_per_iteration {self.prompts_per_iteration} x "
                "group_size)"
            )
        further = self.refill.prompts if self.refill.rounds else None
        if further and self.rollout_rows and further * self.group_size % self.rollout_rows:
            raise UserError(
                f"config.rollout_rows {self.rollout_rows} does not divide the {further * self.group_size} rows of "
                f"config.refill.prompts {further}"
            )
        if self.update_rows and (rows % self.update_rows or self.update_rows % self.group_size):
            raise UserError(
                f"config.update_rows {self.update_rows} is no multiple of config.group_size {self.group_size} that "
                f"divides the {rows} rows of an iteration"
            )
        if self.microbatch_rows and (self.update_rows or rows) % self.microbatch_rows:
            of = f"the {self.update_rows} rows of an update (update_rows)" if self.update_rows else (
                f"the {rows} rows of an iteration (prompts_per_iteration {self.prompts_per_iteration} x group_size "
                f"{self.group_size})"
            )  # fmt: skip
            raise UserError(
                f"config.microbatch_rows {self.microbatch_rows} does not divide {of}: change it, or set it to None"
            )
        if self.model.weights == "int8" and not self.lora.rank:
            raise UserError(
                "config.model.weights is int8, and such weights cannot be trained: set config.lora.rank above 0, or "
                "config.model.weights to stored"
            )
        ranges.require_one_of(self.adapter_base, ranges.ADAPTER_BASES, "config.adapter_base")
        ranges.require_one_of(self.overlong_prompts, ("error", "keep_last"), "config.overlong_prompts")

    @property
    def tracker_names(self) -> tuple[str, ...]:
        """Returns the names of the trackers that the config asks for, each once."""
        short = (name for name in ("tensorboard", "wandb") if getattr(self, name))
        return tuple(dict.fromkeys((*self.trackers, *short)))

    @property
    def overrides(self) -> dict[str, Any]:
        """Returns `checkpoint_overrides` in the form that the loaders of `gdsd_jax.hub` accept."""
        return dataclasses.asdict(self.checkpoint_overrides)

    @property
    def method_settings(self) -> dict[str, Any]:
        """Returns the settings of the run's method."""
        return dict(self.settings.get(self.method, {}))
