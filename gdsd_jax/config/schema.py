"""Settings of a run: `ml_collections` on the command line, frozen once into dataclasses, typed from there on.

A config file (`configs/*.py`) returns a locked `ConfigDict` with exactly the fields of `TrainConfig`; `freeze` turns it
into one and refuses a field that is missing, unknown or of another type. Nothing below the commands sees a ConfigDict.
"""

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
    """How the denoiser computes; its sizes come from the checkpoint. See `gdsd_jax.denoiser.DenoiserConfig`.

    Attributes:
      dtype: of the computation, "bfloat16" or "float32"; log-normalisers, sums, RoPE and the optimizer are float32.
      weights: "stored", or "int8", which keeps the frozen matrices of the layers in 8 bits, with one scale for each
        output channel, for rollouts, scores and updates of adapters. Exports merge onto the stored weights, and
        supervised training works on these.
      remat: what the backward pass computes again: "none" keeps everything, "dots" keeps the outputs of matrix
        products, "full" keeps the inputs of layers alone; "auto" takes the first of these that fits the devices.
      attention: "plain", "splash" (TPUs), "cudnn" (NVIDIA GPUs), or "auto", which chooses by the device.
      layer_unroll: layers per iteration of the compiled loop over layers.
      vocab_chunk: vocabulary entries whose logits exist at one time.
    """

    dtype: str = "bfloat16"
    weights: str = "stored"
    remat: str = "full"
    attention: str = "auto"
    layer_unroll: Count = 1
    vocab_chunk: Count = 16384


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """The low-rank adapters.

    Attributes:
      rank: of each adapter; 0 trains all parameters instead.
      alpha: scale; an adapter's product is multiplied by `alpha / rank`.
      targets: matrices that have an adapter.
      dropout: share of an adapter's inputs that is dropped, in the policy's updates only.
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
    """The task: what is asked and rewarded.

    A task that holds validation rows out of its training set does so with `train_path` too, unless there is a
    `validation_path`.

    Attributes:
      name: of a task of the package, or `package.module:NAME`.
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
    """Evaluation: temperature 0, the rollout's strategy and blocks, no threshold, factor, cache. Defaults: the papers'.

    Attributes:
      steps: denoising steps of a completion of the rollout's length, in proportion of any other; None: one for every
        two tokens.
      evaluation_prompt: start from the task's evaluation prompt, not from its training prompt.
      batch_rows: completions at a time; as many as fit; at temperature 0 the results do not depend on it.
      lengths: completion lengths of `gdsd_jax.evaluate`; while training it is the rollout's.
      every: iterations from one evaluation while training to the next; 0: only at the end.
      split, count: its rows.
      best: the metric by which the best checkpoint is kept, with `every` above 0; None: the task's last.
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
    """Sets or replaces fields of a checkpoint's `config.json`, for what its files do not declare; None changes nothing.

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
    """The embedded model.

    With a `family` (a key of `gdsd_jax.families.FAMILIES`), a `config.checkpoint` that does not exist yet is made:
    random weights in that family's format, then `gdsd_jax.sft`. Empty: the checkpoint must be there.

    Attributes:
      family: its format.
      hidden_size, num_layers, num_heads, intermediate_size: its sizes.
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
    """One run. Rows per iteration are `prompts_per_iteration * group_size`.

    Attributes:
      checkpoint: Hugging Face directory of the base model.
      checkpoint_overrides: what is set or replaced in its `config.json`.
      refill: replaces groups that teach nothing by groups of further prompts.
      reference: the policy that a method's KL compares with.
      extras_optimizer: the optimizer of what a method trains beside the policy (`gdsd_jax.methods.Method.extras`).
      mesh, hosts: how devices are arranged, see `gdsd_jax.runtime.sharding`, and the processes that hold them.
      method: name of the method, or `package.module:NAME`.
      settings: settings of methods, by the method's name.
      seed: of prompts, rollouts, masks and adapters.
      iterations: rollouts of the run.
      prompts_per_iteration: groups of a rollout.
      group_size: completions of each prompt.
      inner_updates: optimizer steps on each rollout.
      update_rows: rows of an optimizer step, whole groups; None: all rows of the rollout. The steps of an iteration
        take one part after the other, in an order of groups that is drawn anew for every pass over the rollout.
      rollout_rows: rows that are sampled at a time, whole groups; None: as many as fit the devices by the estimate of
        `gdsd_jax.training.fit`. No draw depends on it, and rewards of one part are computed while the next is sampled.
      microbatch_rows: rows per gradient accumulation step; None: chosen like `rollout_rows`.
      component_norms_every: iterations between those that log the gradient norm of each component of the loss
        (`grad/objective`, `grad/kl`); 0: never. Their updates are a program of its own, which for a loss of two
        components runs a second backward pass and holds a second gradient. The norm of a single one is `grad/norm`.
      eos_token_id: what alone ends a completion; None: the tokenizer's EOS and all else that ends a turn.
      prompt_buckets: lengths that prompts are left-padded to.
      special_tokens_in_text: whether special tokens that are written in the text of users, prompts and answers of a
        task, are read as such. Else they are text, as anything else is, and only chat templates have special tokens.
      adapter_base: what becomes of an adapter that records another base than the checkpoint. "fingerprint": refused
        where a fingerprint differs, a warning where a name does; "strict": refused; "any": a warning.
      overlong_prompts: "error", or "keep_last" to keep the last tokens that fit the largest bucket.
      save_every: iterations between checkpoints.
      keep: checkpoints that are kept, the newest.
      completions_logged: completions of each iteration in `completions.jsonl`.
      trackers: further places that metrics go to: "tensorboard", "wandb", or `package.module:NAME`, see
        `gdsd_jax.telemetry.trackers`.
      tensorboard, wandb: short for these two among the trackers.
      profile: iteration whose timeline is recorded, see `gdsd_jax.telemetry.profile`; 0: none.
      dry_run: run one iteration in small instead, see `gdsd_jax.training.dry_run`.
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
            raise UserError(f"config.microbatch_rows {self.microbatch_rows} does not divide {of}")
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
