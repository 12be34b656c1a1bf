"""Defines how every command starts: its flags, its config file with overrides, and one-line errors."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import sys
import textwrap
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags, logging
from ml_collections import config_dict, config_flags

from gdsd_jax.config import TrainConfig, freeze, to_dict
from gdsd_jax.config.freeze import unknown_setting
from gdsd_jax.config.read import neighbours, require_config
from gdsd_jax.runtime import front, hosts
from gdsd_jax.runtime.errors import UserError, did_you_mean
from gdsd_jax.runtime.files import require_writable

# What the value of a flag must be, by absl's name of the flag's type.
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}


class Option(NamedTuple):
    """A flag of one command. `kind` is str, int, float or bool; `written` marks a path that the command writes to."""

    kind: type
    default: Any
    help: str
    written: bool = False


def launch(
    main: Callable[..., Any],
    options: Mapping[str, Option] | None = None,
    *,
    needs_workdir: bool = True,
    dry_run: bool = False,
    argv: list[str] | None = None,
) -> None:
    """Runs `main(config, workdir, **values of the options)` with absl flags and a config file.

    Errors end the process as `gdsd_jax.runtime.front` describes. `--help` prints the docstring of `main`'s module and
    the flags.

    Args:
      main: the command; its workdir is None if `--workdir` is not given and not needed.
      options: the command's own flags, by the names of `main`'s arguments.
      needs_workdir: whether `--workdir` must be given.
      dry_run: whether `main` supports `config.dry_run`, which needs no workdir.
      argv: the command line, starting with the program's name; None: that of the process.
    """
    # Orbax would log warnings about its own defaults.
    logging.set_verbosity(logging.ERROR)
    argv = sys.argv if argv is None else argv

    def command() -> None:
        if front.HELP & set(argv):
            print(_usage(main, options or {}))
            return
        _require_jax_defaults()
        config, workdir, values = parse(argv, options or {})
        front.workdir = workdir
        if config.dry_run and not dry_run:
            raise UserError("config.dry_run is for gdsd_jax.train")
        if needs_workdir and workdir is None and not config.dry_run:
            raise UserError("give --workdir DIRECTORY, for the files of the run")
        if needs_workdir and workdir is not None:
            require_writable(workdir, "--workdir")
            if (workdir / "config.json").is_file():
                raise UserError(f"{workdir} is a checkpoint, which a run would write into: choose another --workdir")
        enable_compilation_cache()
        hosts.initialize(config.hosts)
        hosts.agree(_shared(config))
        main(config, workdir, **values)

    front.run(command)


def _require_jax_defaults() -> None:
    """Raises UserError if JAX's rules for types or shapes are not its usual ones, on which all programs rely."""
    for name, usual in (
        ("jax_enable_x64", False), ("jax_numpy_dtype_promotion", "standard"), ("jax_numpy_rank_promotion", "allow"),
    ):  # fmt: skip
        value = getattr(jax.config, name)
        if value != usual:
            shown = getattr(value, "value", value)
            raise UserError(f"{name.upper()} is {shown!r}, and the programs need {usual!r}: unset it")


def _shared(config: TrainConfig) -> dict[str, str]:
    """Returns the settings that must be the same in all processes of a job, by name."""
    plain = to_dict(config)
    plain["hosts"] = {name: value for name, value in plain["hosts"].items() if name in ("processes", "stall_seconds")}
    return {f"config.{name}": repr(value) for name, value in plain.items()}


def enable_compilation_cache() -> None:
    """Keeps compiled programs on disk between runs, in the user's cache unless JAX_COMPILATION_CACHE_DIR is set."""
    # A user without an entry in the list of users may have no home, which leaves the "~" as it is.
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not jax.config.jax_compilation_cache_dir and not root.startswith("~"):
        jax.config.update("jax_compilation_cache_dir", os.path.join(root, "gdsd_jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def parse(argv: list[str], options: Mapping[str, Option]) -> tuple[TrainConfig, Path | None, dict[str, Any]]:
    """Returns the frozen config, the workdir and the options' values.

    ml_collections cannot add a key (`--config.settings.gdsd.psi=3`), nor set a value to None
    (`--config.sampler.threshold=None`). Both kinds of overrides are therefore withheld from it, and applied to the
    config that it makes of the others.
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
    neighbours(file)
    try:
        rest = values(known)[1:]
    except flags.UnrecognizedFlagError as error:
        raise UserError(_unknown_flag(error.flagname, ["workdir", *options])) from None
    except (Exception, SystemExit) as error:  # a config file is a program, which may raise anything
        said = _place(error, file) or _other_kind(error, values) or f"{file}: {_reason(error)}"
        raise UserError(said) from None
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: flags are written --NAME=VALUE")
    config = values["config"].value
    require_config(config, file)
    try:
        config = config.to_dict()
    except config_dict.RequiredValueError:
        raise UserError(f"{file}: {_without_value(config)} has no value: set it") from None
    for argument in free:
        _set_free(config, argument)
    workdir = values["workdir"].value
    chosen = {name: values[name].value for name in options}
    for name in (name for name in options if options[name].written):
        _require_path(name, chosen[name])
    _require_path("workdir", workdir)
    try:
        return freeze(TrainConfig, config), None if workdir is None else Path(workdir), chosen
    except RecursionError:
        raise UserError(f"{file}: a setting holds itself: give it a value that ends") from None


def _without_value(config: config_dict.ConfigDict, where: str = "config") -> str | None:
    """Returns the full name of the first setting that must be given and is not, or None."""
    for name in config:
        try:
            value = config[name]
        except config_dict.RequiredValueError:
            return f"{where}.{name}"
        if isinstance(value, config_dict.ConfigDict) and (found := _without_value(value, f"{where}.{name}")):
            return found
    return None


def _require_path(name: str, value: str | None) -> None:
    """Raises UserError if a path to write to is blank, a flag or a URL, or holds a zero byte; None is allowed."""
    if value is None:
        return
    if value.startswith("-"):
        raise UserError(f"--{name} has no value of its own, {value} follows it: write --{name}=PATH")
    if not value.strip() or "\0" in value:
        raise UserError(f"--{name} {value!r} is not a path: name a file or directory, or leave the flag out")
    if re.match("[a-zA-Z0-9+.-]+:/", value):
        raise UserError(f"--{name} {value} is not on a disk: mount the bucket and name the directory of the mount")


def _underscored(argument: str, options: Mapping[str, Option]) -> str:
    """Returns an argument with the dashes in its flag's name as underscores, if the flag is one of the options."""
    name, equals, value = argument.partition("=")
    plain = name.lstrip("-").replace("-", "_")
    known = plain in options or plain.removeprefix("no") in options
    return f"--{plain}{equals}{value}" if argument.startswith("--") and known else argument


def _override(argument: str) -> list[str] | None:
    """Returns `["a", "b"]` for `--config.a.b=...`, and None for any other argument."""
    name = argument.partition("=")[0].lstrip("-")
    return name.split(".")[1:] if argument.startswith("-") and name.startswith(("config.", "noconfig.")) else None


def _is_free(path: list[str], text: str) -> bool:
    """Returns whether to withhold an override from ml_collections: it sets a key of a mapping, or an optional to None.

    Raises:
      UserError: the path names no setting.
    """
    kind: Any = TrainConfig
    for depth, name in enumerate(path):
        if not dataclasses.is_dataclass(kind):
            if typing.get_origin(kind) is Mapping:
                return True
            raise UserError(f"config.{'.'.join(path[:depth])} is a value, and has no setting {name!r}")
        hints = typing.get_type_hints(kind)
        if name not in hints:
            raise UserError(unknown_setting(".".join(["config", *path[:depth]]), name, hints))
        kind = hints[name]
    return text == "None" and types.NoneType in typing.get_args(kind)


def _set_free(config: dict[str, Any], argument: str) -> None:
    """Applies an override that was withheld from ml_collections to the nested dictionaries of the config."""
    path, (_, equals, text) = _override(argument), argument.partition("=")
    if not equals:
        raise UserError(f"{argument} has no value: write {argument}=VALUE")
    if path[0] == "settings" and len(path) > 3:
        # The name of a user's own method, package.module:NAME, contains dots.
        path = [path[0], ".".join(path[1:-1]), path[-1]]
    for name in path[:-1]:
        config = config.setdefault(name, {})
        if not isinstance(config, dict):
            raise UserError(f"{argument}: {name} already has the value {config!r}, which has no settings")
    config[path[-1]] = _literal(text)


def _literal(text: str) -> Any:
    """Returns the Python literal or float (such as inf) that a text spells, or the text itself if it spells neither."""
    for read in (ast.literal_eval, float):
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return text


def _config_file(argv: Iterable[str]) -> str:
    """Returns the file that `--config` names.

    Raises:
      UserError: the flag or the file is missing.
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
    """Returns `FILE, line N: ERROR` if the config file raised an exception or one that caused it, else None."""
    while error is not None:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        if isinstance(error, SyntaxError) and error.filename == file:
            lines.append(error.lineno)
        if lines and not isinstance(error, flags.Error):
            said = _unknown_name(error) or f"{type(error).__name__}: {_first_line(error)}"
            return f"{file}, line {lines[-1]}: {said}"
        error = error.__context__
    return None


def _unknown_name(error: BaseException) -> str | None:
    """Returns what is wrong if a config file gave a value to a setting that its group of settings lacks, else None."""
    name = re.search('Key "(.*?)" does not exist and cannot be added', str(error))
    if name is None:
        return None
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    known = list(frame.f_locals.get("self", ()))
    return f"unknown setting {name[1]}" + (did_you_mean(name[1], known) or f": it is none of {', '.join(known)}")


def _unknown_flag(name: str, own: Iterable[str]) -> str:
    """Returns the message about an unknown flag; the one meant may be a setting's, whose `config.` is missing."""
    settings = list(_settings(TrainConfig, "config"))
    full = next((setting for setting in settings if setting.endswith(f".{name}")), None)
    meant = f"; did you mean --{full}?" if full else did_you_mean(f"--{name}", [f"--{n}" for n in (*own, *settings)])
    return f"unknown flag --{name}{meant or ': --help lists all of them'}"


def _settings(kind: Any, where: str) -> Iterator[str]:
    """Yields the full names of all settings, those of a group before those of the groups inside it."""
    hints = typing.get_type_hints(kind)
    yield from (f"{where}.{name}" for name in hints)
    for name, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            yield from _settings(hint, f"{where}.{name}")


def _other_kind(error: BaseException, values: flags.FlagValues) -> str | None:
    """Returns what the value of a flag must be, if absl refused the flag because its value is something else."""
    name = re.match("flag --([^=]+)=", str(error))
    if not (isinstance(error, flags.IllegalFlagValueError) and name and name[1] in values and error.__context__):
        return None
    kind = KINDS.get(values[name[1]].flag_type())
    value = str(error)[name.end() :].removesuffix(f": {error.__context__}")
    setting = name[1] if name[1].startswith("config.") else f"--{name[1]}"
    return f"{setting} is {textwrap.shorten(value, 100)!r}, it must be {kind}" if kind else None


def _reason(error: BaseException) -> str:
    """Returns what an error says; of a traceback that absl has put into the message, what its last line says."""
    text = str(error).strip()
    if text.endswith("has no attribute 'get_config'"):
        return "it must define a function get_config(), which returns the config"
    if "Traceback (most recent call last)" not in text:
        return _first_line(error)
    last = textwrap.shorten(text.splitlines()[-1], 200)
    advice = "name its argument as in FILE.py:ARGUMENT" if "argument" in last else "make it a function"
    return f"get_config cannot be called ({last}): {advice}"


def _first_line(error: BaseException) -> str:
    return textwrap.shorten(str(error).strip().split("Other fields present")[0], 300)


def _usage(main: Callable[..., Any], options: Mapping[str, Option]) -> str:
    lines = [
        (sys.modules[main.__module__].__doc__ or "").strip(),
        "",
        "Flags:",
        "  --config FILE         a config file, such as those in configs/",
        "  --config.FIELD=VALUE  overrides one setting; docs/configuration.md lists all of them",
        "  --workdir DIRECTORY   directory of the run",
    ]
    for name, option in options.items():
        value = "" if option.kind is bool else f" {option.kind.__name__.upper()}"
        default = "" if option.default is None else f" Default: {option.default}."
        lines.append(f"  {'--' + name + value:<21} {option.help}{default}")
    return "\n".join(lines)
