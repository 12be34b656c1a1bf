"""Turns the `ml_collections` config of a file or command line into frozen dataclasses, and back into plain values."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from gdsd_jax.config.schema import (
    EvalConfig,
    LoRAConfig,
    ModelConfig,
    TaskConfig,
    TinyConfig,
    TrainConfig,
)
from gdsd_jax.config.updates import OptimizerConfig, SFTConfig
from gdsd_jax.diffusion import SamplerConfig
from gdsd_jax.runtime import ranges
from gdsd_jax.runtime.errors import UserError, did_you_mean


def default(checkpoint: str = "") -> ConfigDict:
    """Returns a locked ConfigDict with every field of `TrainConfig` at its default, for a config file to edit."""
    config = TrainConfig(
        checkpoint=checkpoint,
        task=TaskConfig(),
        model=ModelConfig(),
        lora=LoRAConfig(),
        optimizer=OptimizerConfig(),
        sampler=SamplerConfig(256, steps=256, block_length=32, strategy="low_confidence", temperature=1.0),
        evaluation=EvalConfig(),
        sft=SFTConfig(),
        tiny=TinyConfig(),
    )
    result = ConfigDict(dataclasses.asdict(config), type_safe=False)
    _type_optionals(result, TrainConfig)
    return with_open_settings(result.lock())


def with_open_settings(config: ConfigDict) -> ConfigDict:
    """Unlocks the settings of methods, task and optimizers, whose keys are free, and returns the config."""
    for part in (config, config.task, config.optimizer, config.extras_optimizer, config.sft.optimizer):
        part.settings.unlock()
    return config


def _type_optionals(config: ConfigDict, kind: Any) -> None:
    """Gives every field that is None a type, because ml_collections overrides no field that lacks one."""
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            _type_optionals(config[name], hint)
        elif types.NoneType in typing.get_args(hint) and config[name] is None:
            config[name] = placeholder(next(o for o in typing.get_args(hint) if o is not types.NoneType))


def freeze(kind: Any, values: Any, where: str = "config") -> Any:
    """Builds the dataclass `kind` from a ConfigDict or mapping, nested dataclasses included.

    Raises:
      UserError: a key is unknown or missing, or a value has the wrong type; the message gives the setting's full name.
    """
    if not isinstance(values, (Mapping, ConfigDict)):
        raise UserError(f"{where} is {values!r}, but it is a group of settings: set {where}.NAME")
    values = dict(values.items())
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = ranges.hints(kind)
    for name in sorted(set(values) - set(fields), key=str):
        raise UserError(unknown_setting(where, name, fields))
    missing = [n for n, f in fields.items() if n not in values and _required(f)]
    if missing:
        raise UserError(f"{where}.{missing[0]} is missing")
    return kind(**{name: _convert(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def unknown_setting(where: str, name: object, known: Collection[str]) -> str:
    """Returns the message about an unknown setting of a group: the one meant if one is spelt alike, else all."""
    return f"unknown setting {where}.{name}" + (did_you_mean(name, known) or f": {where} knows {', '.join(known)}")


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a frozen config as nested dictionaries and lists that JSON can hold."""
    return _plain(dataclasses.asdict(config))


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return freeze(hint, value, where)
    return ranges.convert(hint, value.to_dict() if isinstance(value, ConfigDict) else value, where)
