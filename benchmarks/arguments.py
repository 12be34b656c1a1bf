"""Defines how the benches read their command lines: the help shows every default, and a bad value is named."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from gdsd_jax.runtime import ranges
from gdsd_jax.runtime.errors import UserError


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def parser_of(description: str, program: str | None = None) -> argparse.ArgumentParser:
    """Returns a parser whose help shows the description line by line, and the defaults of the flags."""
    return argparse.ArgumentParser(program, description=description, formatter_class=_Formatter)


def number(hint: Any) -> Callable[[str], Any]:
    """Returns a reader of one number with the type and range of a setting, such as `ranges.Count`."""
    (kind, limits) = hint.__origin__, hint.__metadata__[0]

    def read(text: str) -> Any:
        try:
            return ranges.convert(hint, kind(text), "it")
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} must be {what}, {limits}") from None

    return read


def several(read: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Returns a reader of values with commas between."""
    return lambda text: [read(part) for part in text.split(",")]


def one_of(allowed: Sequence[str]) -> Callable[[str], str]:
    """Returns a reader of one of these names."""

    def read(text: str) -> str:
        try:
            ranges.require_one_of(text, allowed, "the name")
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return read
