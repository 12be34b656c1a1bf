"""Loads the model, the tokenizer and the task of a config, and makes the state before the first update."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from gdsd_jax import hub, tasks
from gdsd_jax.config import ModelConfig, TaskConfig, TrainConfig
from gdsd_jax.denoiser import DenoiserConfig, init_lora
from gdsd_jax.denoiser.lora import target_shapes
from gdsd_jax.hub.tokenizer import Tokenizer
from gdsd_jax.methods import METHODS, Method, build, check
from gdsd_jax.runtime import memory
from gdsd_jax.runtime.errors import UserError, did_you_mean
from gdsd_jax.runtime.plugins import is_plugin
from gdsd_jax.runtime.sharding import Dimension, make_mesh
from gdsd_jax.runtime.streams import Stream, stream_key
from gdsd_jax.tasks import Task
from gdsd_jax.telemetry.trackers import require_trackers
from gdsd_jax.training.optimizer import make_optimizer, require_optimizer
from gdsd_jax.training.refill import made_up, selection
from gdsd_jax.training.rollout import Prompts, encode_prompts
from gdsd_jax.training.state import Beside, TrainState, start_state


class Setup(NamedTuple):
    """The model, its base parameters, the tokenizer and the task of a run."""

    model: DenoiserConfig
    base: Any
    tokenizer: Tokenizer
    task: Task


def with_compute(config: DenoiserConfig, compute: ModelConfig) -> DenoiserConfig:
    """Returns the denoiser's config with the run's numerics.

    If `remat` is still "auto", it was not fitted to the devices, and becomes "full".
    """
    settings = dataclasses.asdict(compute)
    del settings["vocab_chunk"]
    if settings["remat"] == "auto":
        settings["remat"] = "full"
    return dataclasses.replace(config, **settings)


def load_setup(config: TrainConfig, *, rows: Mapping[str, int] | None = None) -> Setup:
    """Loads the base checkpoint, its tokenizer and the task.

    The mesh of the config becomes JAX's current mesh, and the base is placed on it.

    Args:
      rows: numbers of rows, by the names of their settings, that the mesh must divide.

    Raises:
      UserError: the task, the checkpoint or the mesh is not valid, or a number of rows cannot fit the memory.
    """
    task = resolve_task(config)
    tokenizer = hub.load_tokenizer(config.checkpoint, config.overrides)
    sizes = hub.read_config(config.checkpoint, config.overrides)
    mesh = make_mesh(config.mesh, dimensions=dimensions(sizes, rows or {}))
    require_room(config, sizes, rows or {})
    jax.set_mesh(mesh)
    model, base = hub.load_checkpoint(
        config.checkpoint, mesh=mesh, overrides=config.overrides, weights=config.model.weights
    )
    tokenizer.special_in_text, tokenizer.embedded = config.special_tokens_in_text, model.vocab_size
    if config.eos_token_id is not None:
        tokenizer.eos_token_id, tokenizer.end_token_ids = config.eos_token_id, ()
    return Setup(with_compute(with_tokens(model, tokenizer), config.model), base, tokenizer, task)


def require_room(config: TrainConfig, model: DenoiserConfig, rows: Mapping[str, int]) -> None:
    """Raises UserError for sizes that the memory cannot hold, before any weight is loaded.

    It counts only arrays that every method needs: the residual stream of the rows that are sampled, one mask for each
    view, and the adapter with its gradient and moments.
    """
    there, tokens = memory.of_devices(), max(config.prompt_buckets) + config.sampler.completion_length
    width = model.hidden_size * (2 if config.model.dtype == "bfloat16" else 4)
    for name, count in {**rows, "config.evaluation.batch_rows": config.evaluation.batch_rows}.items():
        memory.require(count * tokens * width, there, f"{count} rows of {tokens} tokens", name)
    total = config.prompts_per_iteration * config.group_size
    for name in ("views", "pairs", "num_t"):
        views = config.method_settings.get(name)
        if isinstance(views, int):
            setting = f"config.settings.{config.method}.{name}"
            memory.require(views * total * tokens, there, f"{views} views of {total} rows", setting)
    targets = target_shapes(model)
    chosen = sum(sum(targets[target]) for target in config.lora.targets if target in targets)
    adapter = 16 * config.lora.rank * model.num_layers * chosen
    memory.require(adapter, there, f"an adapter of rank {config.lora.rank} with its moments", "config.lora.rank")


def with_tokens(config: DenoiserConfig, tokenizer: hub.Tokenizer) -> DenoiserConfig:
    """Returns the denoiser's config with the tokenizer's ids, so that completions and decoded texts end together."""
    return dataclasses.replace(
        config,
        eos_token_id=tokenizer.eos_token_id,
        end_token_ids=tuple(token for token in tokenizer.end_token_ids if token < config.vocab_size),
        known_tokens=min(tokenizer.vocab_size, config.vocab_size),
    )


def resolve_task(config: TrainConfig, *, evaluation: bool = False) -> Task:
    """Returns the config's task; in a dry run its rows are a few worked examples, unless the config names a file."""
    tasks.require_settings(config.task.settings)
    task = tasks.resolve(config.task.name, evaluation=evaluation, grader=config.task.grader, **config.task.settings)
    if not config.dry_run:
        return task
    if not task.examples and config.task.train_path is None:
        raise UserError(f"task {task.name} has no examples for a dry run: add some, or set config.task.train_path")
    return dataclasses.replace(task, source=lambda *_: list(task.examples))


def evaluated_task(config: TrainConfig) -> Task:
    """Returns the task as evaluations use it; `config.task.settings` override its evaluation prompt too."""
    return resolve_task(config, evaluation=config.evaluation.evaluation_prompt)


def task_rows(
    config: TaskConfig, task: Task, split: str, *, count: int | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """Returns the rows of a split: those of its local file if the config names one, else the task's own.

    Without a `validation_path`, a task that divides its training set (`Task.held_out`) takes the validation rows from
    the training file, and trains on the others.

    Args:
      count: the number of rows; None: all.
      seed: selects the rows of tasks that generate them.
    """
    memory.require((count or 0) * 300, memory.of_host(), f"{count} rows of task {task.name}", "the count")
    path, divided = config.path(split), False
    if config.train_path is not None and config.validation_path is None and task.held_out is not None:
        divided = split != "test"
        path = config.train_path if divided else path
    return task.rows(split, path=path, divided=divided, count=count, seed=seed)


def known_metric(task: Task, metric: str | None, setting: str) -> str:
    """Returns `metric`, or the task's last metric for None.

    Raises:
      UserError: the metric is unknown; the message names `setting`.
    """
    known = task.metrics_named
    if metric is not None and metric not in known:
        raise UserError(f"task {task.name} has no metric {metric!r}: {setting} is one of {', '.join(known)}")
    return metric or known[-1]


def dimensions(model: DenoiserConfig, rows: Mapping[str, int]) -> list[Dimension]:
    """Returns the sizes that a mesh must divide: those of the model, and numbers of rows, by the names of settings."""
    return [
        Dimension("embed", model.hidden_size, "the model's hidden size"),
        Dimension("heads", model.num_heads, "the model's heads"),
        Dimension("mlp", model.intermediate_size, "the model's MLP size"),
        *(Dimension("rows", size, name) for name, size in rows.items()),
    ]


def checked_parts(config: TrainConfig) -> Method:
    """Returns the run's method after all parts that a config names are known to fit, before any model is loaded.

    Raises:
      UserError: the method, the function that selects groups, a tracker, an optimizer or the metric of
        `config.evaluation.best` does not fit.
    """
    method = checked_method(config)
    checked_selection(config)
    require_trackers(config.tracker_names)
    require_optimizer(config.optimizer)
    known_metric(evaluated_task(config), config.evaluation.best, "config.evaluation.best")
    if method.extras is not None:
        require_optimizer(config.extras_optimizer, "config.extras_optimizer")
    return method


def checked_method(config: TrainConfig) -> Method:
    """Builds the run's method and checks it against the contract of methods; nothing is loaded for that.

    The settings of other methods of the package, which a config file may hold too, are only checked to be valid.

    Raises:
      UserError: a method, its settings or the task are not valid, or the run's method breaks the contract.
    """
    method, task = build(config.method, **config.method_settings), resolve_task(config)
    for name, settings in config.settings.items():
        if name not in METHODS and not is_plugin(name):
            names = f"{', '.join(METHODS)}{did_you_mean(name, METHODS)}"
            raise UserError(f"config.settings.{name} names no method: choose from {names}")
        if name in METHODS:
            build(name, **settings)
    check(
        method, name=config.method, prompt_length=max(config.prompt_buckets),
        completion_length=config.sampler.completion_length, group_size=config.group_size, sampler=config.sampler,
        component_weights=tuple(task.weights.items()), token_rewards=task.token_score is not None,
        verdict_names=task.metrics_named, reference=config.reference.every > 0,
        kl=config.reference.kl_target is not None,
    )  # fmt: skip
    return method


def checked_selection(config: TrainConfig) -> None:
    """Finds the function of `config.refill.select`, and tries a user's own on made-up groups of the run's shapes.

    Nothing but the rows of the task is loaded for that.

    Raises:
      UserError: the function cannot be imported, fails, or returns no number for each group.
    """
    refill, count = config.refill, config.prompts_per_iteration
    select = selection(refill.select)
    if not (refill.selects and is_plugin(refill.select)):
        return
    task = resolve_task(config)
    rows = task_rows(config.task, task, "train", count=config.task.train_rows, seed=config.seed)
    for groups in {count, refill.prompts or count}:
        some = [rows[number % len(rows)] for number in range(groups)]
        select(made_up(some, task.weights, config.group_size, config.sampler.completion_length))


def spread_rows(config: TrainConfig) -> dict[str, int]:
    """Returns the numbers of rows that are spread over the mesh, by the names of their settings."""
    prompts = config.refill.prompts if config.refill.rounds else None
    optional = {
        "config.microbatch_rows": config.microbatch_rows,
        "config.rollout_rows": config.rollout_rows,
        "config.refill.prompts x config.group_size": prompts and prompts * config.group_size,
    }
    if config.update_rows:
        optional["config.update_rows"] = config.update_rows
    return {
        "config.prompts_per_iteration x config.group_size": config.prompts_per_iteration * config.group_size,
    } | {name: rows for name, rows in optional.items() if rows}


def beside_policy(config: TrainConfig, method: Method, model: DenoiserConfig) -> Beside:
    """Describes the parts of a run's state beside the policy and its optimizer."""
    extras = optimizer = None
    if method.extras is not None:
        extras = lambda: method.extras(stream_key(jax.random.key(config.seed), Stream.EXTRAS), model)  # noqa: E731
        optimizer, _ = make_optimizer(
            config.extras_optimizer, config.iterations * config.inner_updates, "config.extras_optimizer"
        )
    return Beside(extras, optimizer, config.reference.every > 0, config.reference.kl_target is not None)


class Fresh(NamedTuple):
    """The state before the first update, its placement, the policy's optimizer and schedule, and the other parts."""

    state: TrainState
    places: TrainState
    optimizer: Any
    schedule: Any
    beside: Beside


def fresh_state(config: TrainConfig, setup: Setup, method: Method) -> Fresh:
    """Makes the state before the first update, and the optimizer that trains it."""
    optimizer, schedule = make_optimizer(config.optimizer, config.iterations * config.inner_updates)
    beside = beside_policy(config, method, setup.model)

    def trained(base: Any) -> Any:
        if not config.lora.rank:
            return base
        key = stream_key(jax.random.key(config.seed), Stream.ADAPTER)
        return init_lora(setup.model, key, **dataclasses.asdict(config.lora))

    state, places = start_state(setup.model, optimizer, config.seed, trained, setup.base, beside)
    return Fresh(state, places, optimizer, schedule, beside)


def encoded_rows(config: TrainConfig, task: Task, tokenizer: hub.Tokenizer, rows: list[dict]) -> Prompts:
    """Renders the rows of a task and pads their prompts to the config's buckets."""
    return encode_prompts(task, tokenizer, rows, buckets=config.prompt_buckets, overlong=config.overlong_prompts)
