"""Every number of a config and of a method's settings has a range, every field a type, and both are checked."""

import copy
import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping

import pytest

from gdsd_jax.config import TrainConfig, default, freeze, to_dict
from gdsd_jax.methods import METHODS, build
from gdsd_jax.runtime import ranges
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.ranges import Bound

# Names of numbers that may be negative.
SIGNED = {"mesh.data", "mesh.fsdp", "mesh.tensor"}


def leaves(kind: type, path: str = "") -> Iterator[tuple[str, object]]:
    """Yields name and annotation of every field that is not a dataclass."""
    for name, hint in ranges.hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from leaves(hint, f"{path}{name}.")
        else:
            yield path + name, hint


def plain(hint: object) -> type:
    """Returns the type of the values, without None and ranges."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(option for option in typing.get_args(hint) if option is not types.NoneType)
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    return typing.get_origin(hint) or hint


DEFAULTS = to_dict(freeze(TrainConfig, default("somewhere")))
FIELDS = dict(leaves(TrainConfig))
NUMBERS = {name: hint for name, hint in FIELDS.items() if plain(hint) in (int, float)}


def changed(name: str, value: object) -> TrainConfig:
    values = copy.deepcopy(DEFAULTS)
    inner = name.split(".")
    place = values
    for part in inner[:-1]:
        place = place[part]
    place[inner[-1]] = value
    return freeze(TrainConfig, values)


@pytest.mark.parametrize("value", [b"1", {1: 2}, [print], {"a": [{"b": object()}]}, float("nan")])
def test_settings_of_any_type_are_what_json_holds(value):
    """The record of a run is JSON, and a resumed run compares its settings with that."""
    with pytest.raises(UserError, match="config.task.settings.examples"):
        changed("task.settings", {"examples": [{"puzzle": value}]})


def test_a_long_value_is_shortened_in_messages():
    with pytest.raises(UserError) as refused:
        changed("seed", "7" * 100_000)
    assert len(str(refused.value)) < 300


def test_there_are_numbers():
    assert len(NUMBERS) > 40


@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_takes_nan_or_what_lies_beyond_float32(name):
    for value in (math.nan, math.inf, 1e300, 1e-300, 1e-39):
        with pytest.raises(UserError, match=name.rpartition(".")[2]):
            changed(name, value)


@pytest.mark.parametrize("name", [name for name in NUMBERS if name not in SIGNED])
def test_no_number_is_negative(name):
    for value in (-1, -0.2):
        with pytest.raises(UserError, match=name.rpartition(".")[2]):
            changed(name, value)


ODD = (object(), {1: 2}, "text", True, [[]])
# The values of `ODD` that a field of a type accepts.
FITTING = {str: "text", bool: True, Mapping: {1: 2}}


@pytest.mark.parametrize("name", FIELDS)
def test_no_field_takes_another_type(name):
    kind = plain(FIELDS[name])
    for value in ODD:
        if FITTING.get(kind) != value:
            with pytest.raises(UserError):
                changed(name, value)


@pytest.mark.parametrize("method", METHODS)
def test_settings_of_methods(method):
    for name, hint in leaves(METHODS[method].settings):
        if plain(hint) not in (int, float):
            continue
        infinities = () if hint == Bound else (math.inf,)
        for value in (math.nan, -1, "text", True, -math.inf, *infinities):
            with pytest.raises(UserError, match=rf"config\.settings\.{method}\.{name}"):
                build(method, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer.clip_norm", 0.0), ("optimizer.clip_norm", -0.2), ("optimizer.b1", 2.0), ("optimizer.b2", 1.0),
        ("lora.dropout", 1.0), ("lora.alpha", 0.0), ("sft.steps", 0), ("sft.careless", 1.5),
        ("iterations", 0), ("seed", 2**32), ("prompt_buckets", ()), ("prompt_buckets", (4, 0)), ("mesh.data", -2),
        ("lora.targets", "q"), ("lora.targets", (1,)), ("task", 3), ("settings", {"gdsd": 3}), ("keep", 0),
        ("checkpoint", "a\0b"), ("evaluation.lengths", ()),
    ],
)  # fmt: skip
def test_limits(name, value):
    with pytest.raises(UserError, match=rf"config\.{name}"):
        changed(name, value)


def test_what_fits_is_converted():
    config = changed("prompt_buckets", [4, 8])
    assert config.prompt_buckets == (4, 8)
    assert type(changed("optimizer.learning_rate", 1).optimizer.learning_rate) is float
    assert build("gdsd", eps_high=math.inf, psi=3) is not None
    with pytest.raises(UserError, match="learning_rate"):
        dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=math.nan))
