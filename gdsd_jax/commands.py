"""What the commands share: flags, one-line errors, and the model, tokenizer and task that a config and flags name."""

from __future__ import annotations

import ast
import dataclasses
import errno
import json
import os
import sys
import textwrap
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from ml_collections import config_flags

from gdsd_jax import hub, tasks
from gdsd_jax.config import ModelConfig, TaskConfig, TrainConfig, freeze, to_dict
from gdsd_jax.denoiser import DenoiserConfig, LoRA, init_lora
from gdsd_jax.errors import UserError
from gdsd_jax.hub.tokenizer import Tokenizer
from gdsd_jax.sharding import Dimension, make_mesh, place
from gdsd_jax.tasks import Task
from gdsd_jax.training import multihost
from gdsd_jax.training.state import parameter_shardings

if TYPE_CHECKING:
    from gdsd_jax.training.rollout import Rewarded

# Outcomes of a disk or a path that the user can change, wherever they strike.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR}

# ----------------------------------------------------------------------------------------------------------------------
# What a command works on


class Setup(NamedTuple):
    """What every command needs of a run."""

    model: DenoiserConfig
    base: Any
    tokenizer: Tokenizer
    task: Task


class Policy(NamedTuple):
    """A model to evaluate, talk to or export: a checkpoint, with or without an adapter, or what a run has trained.

    base, lora: `denoise`'s parameters; float32 where a run has trained all of them.
    source: directory of the checkpoint that the base came from.
    stored: dtypes of that checkpoint, a pytree like `base`.
    iteration: finished iterations of the run, None where the policy comes from directories alone.
    """

    model: DenoiserConfig
    base: Any
    lora: LoRA | None
    tokenizer: Tokenizer
    task: Task
    source: str
    stored: Any
    iteration: int | None


def with_compute(config: DenoiserConfig, compute: ModelConfig) -> DenoiserConfig:
    """The denoiser's config with the run's numerics."""
    settings = dataclasses.asdict(compute)
    del settings["vocab_chunk"]
    return dataclasses.replace(config, **settings)


def load(config: TrainConfig, *, rows: Mapping[str, int] | None = None) -> Setup:
    """Loads the base checkpoint, its tokenizer and the task; every input error surfaces here, before work starts.

    The mesh of the config becomes JAX's current one, and the base lies on it.

    Args:
      rows: numbers of rows, by name, that must be spread evenly over the mesh.
    """
    task = resolve_task(config)
    tokenizer = hub.load_tokenizer(config.checkpoint)
    mesh = make_mesh(config.mesh, dimensions=dimensions(hub.read_config(config.checkpoint), rows or {}))
    jax.set_mesh(mesh)
    model, base = hub.load_checkpoint(config.checkpoint, mesh=mesh)
    if config.eos_token_id is not None:
        tokenizer.eos_token_id = config.eos_token_id
    # One EOS everywhere: what ends the text that is rewarded ends the completion that is scored.
    model = dataclasses.replace(model, eos_token_id=tokenizer.eos_token_id)
    return Setup(with_compute(model, config.model), base, tokenizer, task)


def resolve_task(config: TrainConfig, *, evaluation: bool = False) -> Task:
    """The config's task; its rows are a few worked examples in a dry run, unless a local file is named."""
    task = tasks.resolve(config.task.name, evaluation=evaluation, **config.task.settings)
    return dataclasses.replace(task, source=lambda *_: list(task.examples)) if config.dry_run else task


def evaluated_task(config: TrainConfig) -> Task:
    """The task as it is evaluated; `config.task.settings` hold over its evaluation prompt too."""
    return resolve_task(config, evaluation=config.evaluation.evaluation_prompt)


def task_rows(
    config: TaskConfig, task: Task, split: str, *, count: int | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """The rows of a split: of its local file where there is one, else the task's own.

    Without a `validation_path`, a task that divides its training set (`Task.held_out`) takes the validation rows out of
    the training file, and trains on the others.
    """
    path, divided = config.path(split), False
    if config.train_path is not None and config.validation_path is None and task.held_out is not None:
        divided = split != "test"
        path = config.train_path if divided else path
    return task.rows(split, path=path, divided=divided, count=count, seed=seed)


def known_metric(task: Task, metric: str | None, setting: str) -> str:
    """`metric`, or the task's last one; UserError, which names the setting, if the task has no such metric."""
    known = task.metrics_named
    if metric is not None and metric not in known:
        raise UserError(f"task {task.name} has no metric {metric!r}: {setting} is one of {', '.join(known)}")
    return metric or known[-1]


def dimensions(model: DenoiserConfig, rows: Mapping[str, int]) -> list[Dimension]:
    """What a mesh must divide: the model, and numbers of rows by the name of their setting."""
    return [
        Dimension("embed", model.hidden_size, "the model's hidden size"),
        Dimension("heads", model.num_heads, "the model's heads"),
        Dimension("mlp", model.intermediate_size, "the model's MLP size"),
        *(Dimension("rows", size, name) for name, size in rows.items()),
    ]


def load_policy(
    config: TrainConfig,
    workdir: Path | None = None,
    *,
    checkpoint: str | None = None,
    adapter: str | None = None,
    best: bool = False,
) -> Policy:
    """The policy that the flags name: `checkpoint` with `adapter`, or else the newest checkpoint of a run.

    Args:
      config: gives the task, the numerics and, unless `checkpoint` does, the base.
      workdir: of a run of `gdsd_jax.train`; not looked at when one of the others is given.
      checkpoint: a Hugging Face directory.
      adapter: a PEFT directory.
      best: of the run, the checkpoint that did best in its evaluations.

    Raises:
      UserError: nothing is named; the run trained another base or other adapters; a directory does not load.
    """
    if checkpoint is None and adapter is None and workdir is None:
        raise UserError("no model is named: give --workdir of a run, or --checkpoint, or --adapter")
    if checkpoint is not None:
        config = dataclasses.replace(config, checkpoint=checkpoint)
    from_run = checkpoint is None and adapter is None
    if best and not from_run:
        raise UserError("--best chooses among a run's checkpoints: give --workdir without --checkpoint and --adapter")
    record = _run_record(config, workdir) if from_run else None
    model, base, tokenizer, task = load(config)
    stored = jax.tree.map(lambda x: x.dtype, base)
    lora, iteration = None, None
    if adapter is not None:
        lora = hub.load_adapter(adapter, model)
        lora = place(lora, parameter_shardings(model, lora))
    elif record is not None:
        # Late: Orbax takes seconds to import, and only runs need it.
        from gdsd_jax.training.checkpoint import load_params

        if config.lora.rank:
            make = lambda key: init_lora(model, key, **dataclasses.asdict(config.lora))  # noqa: E731
            shapes = jax.eval_shape(make, jax.random.key(0))
            lora, iteration = load_params(workdir, shapes, parameter_shardings(model, shapes), best=best)
        else:
            # The shapes alone, so that two whole models are never in memory.
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), base)
            places = jax.tree.map(lambda x: x.sharding, base)
            del base
            base, iteration = load_params(workdir, shapes, places, best=best)
    return Policy(model, base, lora, tokenizer, task, config.checkpoint, stored, iteration)


def read_record(workdir: Path) -> dict[str, Any]:
    """The `run.json` of a training run: its config and the fingerprint of its base.

    Raises:
      UserError: there is none, or it does not parse.
    """
    path = workdir / "run.json"
    if not path.is_file():
        raise UserError(f"{workdir} holds no training run: train first, or give another --workdir or a --checkpoint")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} does not parse ({error}): restore it or give another --workdir") from None


def _run_record(config: TrainConfig, workdir: Path) -> dict[str, Any]:
    """The record of the run, which must have trained the same parameters as `config` describes."""
    record = read_record(workdir)
    if record["config"]["lora"] != to_dict(config)["lora"]:
        raise UserError(f"{workdir} belongs to a run with another config.lora: give the --config that it started with")
    if record["base"] != hub.fingerprint(config.checkpoint):
        raise UserError(f"{workdir} was trained from another base than {config.checkpoint}: change config.checkpoint")
    return record


def refuse_existing(directory: Path, flag: str = "--workdir") -> None:
    """Raises UserError if `directory` holds something."""
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"{directory} is not empty: choose another {flag} or remove it")


def diverged(
    workdir: Path, iteration: int, rewarded: Rewarded, tokenizer: Tokenizer, latest: int | None
) -> UserError:
    """Saves the rollouts on which training broke and returns the error that says so.

    Writes `workdir/diverged/ITERATION.npz` (tokens, masks, rewards, commit steps, confidences) and `ITERATION.json`
    (texts, reward components).

    Args:
      latest: iteration of the last good checkpoint, None if there is none.
    """
    # Late: what the other commands do without.
    from gdsd_jax.training.rollout import completion_records, fetch

    directory = workdir / "diverged"
    fields = {field.name: getattr(rewarded.batch, field.name) for field in dataclasses.fields(rewarded.batch)}
    arrays = fetch({name: value for name, value in fields.items() if value is not None})
    if multihost.first():
        directory.mkdir(parents=True, exist_ok=True)
        np.savez(directory / f"{iteration}.npz", **arrays)
        rows = completion_records(rewarded, tokenizer, range(len(rewarded.completions)))
        (directory / f"{iteration}.json").write_text(json.dumps(rows, indent=1) + "\n")
    kept = "there is no checkpoint yet" if latest is None else f"the last good checkpoint is that of iteration {latest}"
    return UserError(
        f"the update of iteration {iteration} is not finite; its batch is in {directory / f'{iteration}.npz'}, {kept}: "
        "lower config.optimizer.learning_rate, or psi, or set a clip (eps_low, eps_high) in config.settings, "
        "and start in another --workdir"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Flags and errors


class Option(NamedTuple):
    """A flag of one command. `kind` is str, int, float or bool."""

    kind: type
    default: Any
    help: str


# The flags by which `load_policy` is told what to load.
POLICY_OPTIONS = {
    "checkpoint": Option(str, None, "Hugging Face directory to use instead of the run's newest checkpoint."),
    "adapter": Option(str, None, "PEFT directory to use on --checkpoint, or on the config's own."),
    "best": Option(bool, False, "Of the run, the checkpoint that did best in its evaluations, not the newest."),
}


def launch(
    main: Callable[..., Any],
    options: Mapping[str, Option] | None = None,
    *,
    needs_workdir: bool = True,
    dry_run: bool = False,
    argv: list[str] | None = None,
) -> None:
    """Runs `main(config, workdir, **values of the options)` with absl flags and a config file.

    What a user can act on ends the process with one line on stderr and exit code 2. `--help` shows the docstring of
    main's module and the flags.

    Args:
      needs_workdir: False where `main` also takes None.
      dry_run: whether `main` can do a `config.dry_run`, which needs no workdir.
      argv: the command line, program name first; None is that of the process.
    """
    # Read when transformers is first imported, which happens late: it would announce that PyTorch is absent.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Orbax warns of its own defaults.
    logging.set_verbosity(logging.ERROR)
    argv = sys.argv if argv is None else argv
    try:
        if {"--help", "-help", "-h"} & set(argv):
            print(_usage(main, options or {}))
            return
        config, workdir, values = _parse(argv, options or {})
        if config.dry_run and not dry_run:
            raise UserError("config.dry_run is for gdsd_jax.train")
        if needs_workdir and workdir is None and not config.dry_run:
            raise UserError("give --workdir DIRECTORY, where the run's files go")
        enable_compilation_cache()
        multihost.initialize(config.hosts)
        main(config, workdir, **values)
    except UserError as error:
        fail(error)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        fail(f"{error}: change the directory, or make room")
    except Exception as error:
        if not multihost.several():
            raise
        traceback.print_exc()
        multihost.leave(error)


def enable_compilation_cache() -> None:
    """Keeps compiled programs between runs, in the user's cache unless JAX_COMPILATION_CACHE_DIR says otherwise."""
    if not jax.config.jax_compilation_cache_dir:
        root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(root / "gdsd_jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def fail(error: object) -> None:
    """Ends the process with one line on stderr."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    multihost.end(2)


def _parse(argv: list[str], options: Mapping[str, Option]) -> tuple[TrainConfig, Path | None, dict[str, Any]]:
    """The frozen config, the workdir and the options' values.

    Settings of methods and tasks (`--config.settings.gdsd.psi=3`) have no fixed names, and ml_collections clears no
    setting that has a value (`--config.sampler.threshold=None`), so these are taken out before it sees them and put
    into the config that it made.
    """
    known, free = [argv[0]], []
    for argument in argv[1:]:
        path = _override(argument)
        if path is None:
            argument = _underscored(argument, options)
        (free if path and _is_free(path, argument.partition("=")[2]) else known).append(argument)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=known)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    define = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
    for name, option in options.items():
        define[option.kind](name, option.default, option.help, flag_values=values)
    file = _config_file(known)
    try:
        rest = values(known)[1:]
    except Exception as error:
        place = _place(error, file)
        if place is None and not isinstance(error, flags.Error):
            raise
        raise UserError(place or _first_line(error)) from None
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: flags are written --NAME=VALUE")
    config = values["config"].value.to_dict()
    for argument in free:
        _set_free(config, argument)
    workdir = values["workdir"].value
    if workdir is not None and "://" in workdir:
        raise UserError(f"--workdir {workdir} is no directory: mount the bucket and name the place where it is mounted")
    chosen = {name: values[name].value for name in options}
    return freeze(TrainConfig, config), None if workdir is None else Path(workdir), chosen


def _underscored(argument: str, options: Mapping[str, Option]) -> str:
    """A flag's name may be written with dashes for its underscores."""
    name, equals, value = argument.partition("=")
    plain = name.lstrip("-").replace("-", "_")
    known = plain in options or plain.removeprefix("no") in options
    return f"--{plain}{equals}{value}" if argument.startswith("--") and known else argument


def _override(argument: str) -> list[str] | None:
    """`["a", "b"]` of `--config.a.b=...`, None for any other argument."""
    name = argument.partition("=")[0].lstrip("-")
    return name.split(".")[1:] if argument.startswith("-") and name.startswith(("config.", "noconfig.")) else None


def _is_free(path: list[str], text: str) -> bool:
    """Whether ml_collections has to be spared it: a key of a mapping, or None for what may be None.

    Raises UserError where the path leads nowhere.
    """
    kind: Any = TrainConfig
    for depth, name in enumerate(path):
        if not dataclasses.is_dataclass(kind):
            if typing.get_origin(kind) is Mapping:
                return True
            raise UserError(f"config.{'.'.join(path[:depth])} is a value, it has no setting {name!r}")
        hints = typing.get_type_hints(kind)
        if name not in hints:
            where = ".".join(["config", *path[:depth]])
            raise UserError(f"unknown setting {where}.{name}: {where} knows {', '.join(hints)}")
        kind = hints[name]
    return text == "None" and types.NoneType in typing.get_args(kind)


def _set_free(config: dict[str, Any], argument: str) -> None:
    """Sets what an override of free settings says in nested dictionaries."""
    path, (_, equals, text) = _override(argument), argument.partition("=")
    if not equals:
        raise UserError(f"{argument} has no value: write {argument}=VALUE")
    if path[0] == "settings" and len(path) > 3:
        # A user's own method is called package.module:NAME.
        path = [path[0], ".".join(path[1:-1]), path[-1]]
    for name in path[:-1]:
        config = config.setdefault(name, {})
    config[path[-1]] = _literal(text)


def _literal(text: str) -> Any:
    """A Python literal, a float such as inf, or else the text itself."""
    for read in (ast.literal_eval, float):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text


def _config_file(argv: Iterable[str]) -> str:
    """The file that `--config` names.

    Raises:
      UserError: no such flag or no such file.
    """
    given = ""
    arguments = iter(argv)
    for argument in arguments:
        if argument in ("--config", "-config"):
            given = next(arguments, "")
        elif argument.startswith(("--config=", "-config=")):
            given = argument.partition("=")[2]
    file = given.partition(":")[0]
    if not file:
        raise UserError("give --config FILE, for instance one of configs/")
    if not Path(file).is_file():
        raise UserError(f"config file {file} does not exist: change --config")
    return file


def _place(error: BaseException | None, file: str) -> str | None:
    """`FILE, line N: what happened` for an exception that came out of the config file, however it was wrapped."""
    while error is not None:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        if isinstance(error, SyntaxError) and error.filename == file:
            lines.append(error.lineno)
        if lines and not isinstance(error, flags.Error):
            return f"{file}, line {lines[-1]}: {type(error).__name__}: {_first_line(error)}"
        error = error.__context__
    return None


def _first_line(error: BaseException) -> str:
    return textwrap.shorten(str(error).strip().split("Other fields present")[0], 300)


def _usage(main: Callable[..., Any], options: Mapping[str, Option]) -> str:
    lines = [
        sys.modules[main.__module__].__doc__.strip(),
        "",
        "Flags:",
        "  --config FILE         a file of configs/",
        "  --config.FIELD=VALUE  another value for one setting; gdsd_jax/config.py describes them",
        "  --workdir DIRECTORY   of the run",
    ]
    for name, option in options.items():
        value = "" if option.kind is bool else f" {option.kind.__name__.upper()}"
        default = "" if option.default is None else f" Default: {option.default}."
        lines.append(f"  {'--' + name + value:<21} {option.help}{default}")
    return "\n".join(lines)
