"""Types and ranges of settings, declared beside the fields of a dataclass: `rate: Positive = 1e-3`.

A number without a range of its own is finite and not negative; a float fits into float32, of which it is 0 or a normal
number, and an int fits into int32.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from gdsd_jax.runtime.errors import UserError, did_you_mean

LARGEST_FLOAT, LARGEST_INT = 3.4028234e38, 2**31 - 1
SMALLEST_FLOAT = 1.1754944e-38  # smaller ones become 0 on the devices, where some of them divide


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from `least` to `most` (None: the largest int32 or float32); `above` and `below` exclude an end."""

    least: float = 0.0
    most: float | None = None
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        """Returns whether the number lies in the range; NaN lies in none."""
        most = self.most if self.most is not None else LARGEST_INT if isinstance(value, int) else LARGEST_FLOAT
        low = value > self.least if self.above else value >= self.least
        return low and (value < most if self.below else value <= most)

    def __str__(self) -> str:
        low = f"above {self.least:g}" if self.above else f"at least {self.least:g}"
        if self.most is None or math.isinf(self.most):
            return low if self.most is not None else f"{low} and finite"
        most = f"{self.most:g}" if isinstance(self.most, float) else self.most
        return f"{low} and {'below' if self.below else 'at most'} {most}"


Count = Annotated[int, Range(1)]
# A number of masked views or the like, each of which becomes a part of the compiled program.
Few = Annotated[int, Range(1, 100_000)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Positive = Annotated[float, Range(above=True)]
Share = Annotated[float, Range(0, 1)]
BelowOne = Annotated[float, Range(0, 1, below=True)]
# A bound that may be infinite, which means that there is none.
Bound = Annotated[float, Range(0, math.inf)]
# Values of `config.adapter_base` and of the like arguments of other programs.
ADAPTER_BASES = ("fingerprint", "strict", "any")


@functools.cache
def hints(kind: type) -> dict[str, Any]:
    """Returns the annotations of a dataclass with their ranges."""
    return typing.get_type_hints(kind, include_extras=True)


def convert(hint: Any, value: Any, where: str) -> Any:
    """Returns a value in the type of its annotation: ints become floats, and lists tuples, if the annotation says so.

    Raises:
      UserError: the value has another type, or is a number out of its range; the message begins with `where`.
    """
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        options = typing.get_args(hint)
        if value is None and types.NoneType in options:
            return None
        options = [option for option in options if option is not types.NoneType]
        if len(options) == 1:
            return convert(options[0], value, where)
        for option in options:
            try:
                return convert(option, value, where)
            except UserError:
                continue
        raise UserError(f"{where} is {value!r:.200}, not of type {_name(hint)}")
    base, limits = hint, Range()
    if typing.get_origin(hint) is Annotated:
        base, *notes = typing.get_args(hint)
        limits = next((note for note in notes if isinstance(note, Range)), limits)
    origin = typing.get_origin(base) or base
    if origin is float and type(value) is int:
        value = float(value) if abs(value) < 2**1023 else math.inf
    if origin in (int, float) and type(value) is origin:
        if not limits.holds(value):
            allowed = f"at most {LARGEST_INT}" if origin is int and value > LARGEST_INT else limits
            raise UserError(f"{where} is {value!r:.200}, it must be {allowed}")
        if 0 < abs(value) < SMALLEST_FLOAT:
            raise UserError(f"{where} is {value!r:.200}, which is 0 in float32: give 0 or a larger number")
        return value
    if origin in (tuple, Sequence) and isinstance(value, (tuple, list)):
        (inner, *_) = typing.get_args(base) or (Any,)
        return tuple(convert(inner, item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is Mapping and isinstance(value, Mapping):
        of_keys, inner = typing.get_args(base) or (Any, Any)
        odd = [key for key in value if of_keys is str and not isinstance(key, str)]
        if odd:
            raise UserError(f"{where} has the key {odd[0]!r}, which is no text: names of settings are texts")
        return {key: convert(inner, item, f"{where}.{key}") for key, item in value.items()}
    if origin in (bool, str) and type(value) is origin:
        if origin is str and "\0" in value:
            raise UserError(f"{where} is {value!r:.200}, which holds a zero byte")
        return value
    if dataclasses.is_dataclass(origin) and isinstance(value, origin):
        check(value, where)
        return value
    if origin is Any:
        if isinstance(value, float) and math.isnan(value):
            raise UserError(f"{where} is {value!r:.200}, it must be a number")
        if isinstance(value, Mapping):
            convert(Mapping[str, Any], value, where)
        elif isinstance(value, (tuple, list)):
            convert(Sequence[Any], value, where)
        elif not (value is None or isinstance(value, (bool, int, float, str))):
            kind = type(value).__name__
            raise UserError(f"{where} is a {kind}: give texts, numbers, lists and mappings, which JSON can hold")
        return value
    raise UserError(f"{where} is {value!r:.200}, not of type {_name(hint)}")


def require_one_of(value: str, allowed: Sequence[str], where: str) -> None:
    """Raises UserError, whose message begins with `where`, unless a value is one of those allowed."""
    if value not in allowed:
        raise UserError(f"{where} {value!r:.200} is not one of {', '.join(allowed)}{did_you_mean(value, allowed)}")


def check(settings: Any, where: str) -> None:
    """Checks every field of a dataclass, including the fields of nested dataclasses.

    Raises:
      UserError: as for `convert`; the message gives the field's full name, which begins with `where`.
    """
    for name, hint in hints(type(settings)).items():
        convert(hint, getattr(settings, name), f"{where}.{name}" if where else name)


def build(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """Returns the dataclass `kind` with these values of its fields, each converted and checked.

    Raises:
      UserError: as for `convert`, or for a value that the dataclass itself refuses.
    """
    known = hints(kind)
    made = kind(**{name: convert(known[name], value, f"{where}.{name}") for name, value in values.items()})
    check(made, where)
    return made


def _name(hint: Any) -> str:
    """Returns how an error message names a type, without ranges and the modules of generic types."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _name(arguments[0])
    if hint is types.NoneType or hint is Ellipsis or hint is Any:
        return {types.NoneType: "None", Ellipsis: "..."}.get(hint, "Any")
    if origin in (types.UnionType, typing.Union):
        return " | ".join(map(_name, arguments))
    if arguments:
        return f"{origin.__name__}[{', '.join(map(_name, arguments))}]"
    return hint.__name__ if isinstance(hint, type) else str(hint)
