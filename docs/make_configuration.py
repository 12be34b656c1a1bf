"""Writes docs/configuration.md from the dataclasses: every setting with its default and its description.

    python docs/make_configuration.py

A test compares the file with what this script returns.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
import typing
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("configuration.md")
sys.path.insert(0, str(FILE.resolve().parents[1]))

from gdsd_jax.config import TrainConfig, default, freeze  # noqa: E402
from gdsd_jax.methods import METHODS  # noqa: E402
from gdsd_jax.runtime import ranges  # noqa: E402

HEAD = """# Configuration

A config file is a Python file with a function `get_config`. It starts from the defaults, `gdsd_jax.config.default()`,
or from another config file, changes some settings and returns the result:

```python
from gdsd_jax.config import read_config


def get_config():
    config = read_config("configs/tiny_sudoku.py")  # path from the current directory
    config.iterations = 3
    return config
```

The command line overrides single settings: `--config.iterations=100`, `--config.sampler.threshold=None`,
`--config.optimizer.learning_rate=1e-4`. A setting that does not exist, or a value of another type or out of range,
ends the command with one line that says so. From Python, `freeze(TrainConfig, config)` makes the same checks and
returns the dataclass that the functions of the package take. Numbers are finite and not negative, unless their type
says otherwise.

This page is generated from the dataclasses by `python docs/make_configuration.py`; edit their docstrings instead.
"""
METHOD_HEAD = """## config.settings

Settings of methods, by the method's name: `--config.settings.gdsd.psi=0.5`, or
`config.settings["gdsd"] = {"psi": 0.5}` in a config file. A method of your own is named `package.module:NAME` here too.
[Methods](methods.md) has their equations.
"""


class Described(NamedTuple):
    """The prose of a dataclass's docstring, and the description of each field that has one."""

    prose: str
    fields: dict[str, str]


def described(kind: type) -> Described:
    """Reads the docstring of a dataclass; fields without a description of their own take that of a base class."""
    known = {field.name for field in dataclasses.fields(kind)}
    fields: dict[str, str] = {}
    for base in reversed(kind.__mro__[1:]):
        if dataclasses.is_dataclass(base):
            fields |= described(base).fields
    prose, current, depth = [], [], 0
    for line in (inspect.getdoc(kind) or "").splitlines():
        names, colon, text = line.strip().partition(":")
        indent, listed = len(line) - len(line.lstrip()), [name.strip() for name in names.split(",")]
        if colon and known.issuperset(listed):
            current, depth = listed, indent
            fields |= dict.fromkeys(current, text.strip())
        elif current and line.strip() and indent > depth:
            fields |= {name: f"{fields[name]} {line.strip()}" for name in current}
        elif line.strip() not in ("Attributes:", "Args:"):
            current = []
            prose.append(line)
    return Described("\n".join(prose).strip(), fields)


def type_name(hint: Any) -> str:
    """Returns a type as a reader writes it: `int`, `str | None`, `tuple[int, ...]`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return type_name(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(type_name, arguments))
    if arguments:
        return f"{origin.__name__}[{', '.join(map(type_name, arguments))}]"
    named = {types.NoneType: "None", ...: "...", Any: "Any"}
    return named.get(hint, getattr(hint, "__name__", ""))


def allowed(hint: Any) -> str:
    """Returns in words which numbers a setting takes, where that is declared beside it."""
    found = [str(extra).removesuffix(" and finite") for extra in getattr(hint, "__metadata__", ())]
    return ", ".join([*found, *filter(None, map(allowed, typing.get_args(hint)))]) if hint is not ... else ""


def table(kind: type, values: Any, hints: dict[str, Any]) -> list[str]:
    """Returns one dataclass's settings as a Markdown table; nested dataclasses have sections of their own."""
    about, lines = described(kind).fields, ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            continue
        hint, value = hints[field.name], getattr(values, field.name)
        kinds = ", ".join(filter(None, (f"`{type_name(hint)}`", allowed(hint))))
        cells = (f"`{field.name}`", kinds, f"`{value!r}`", about.get(field.name, ""))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def section(title: str, kind: type, values: Any) -> list[str]:
    """Returns the section of one dataclass, followed by those of the dataclasses inside it."""
    hints = ranges.hints(kind)
    lines = [f"## {title}", "", described(kind).prose, "", *table(kind, values, hints), ""]
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            lines += section(f"{title}.{field.name}", hints[field.name], getattr(values, field.name))
    return lines


def page() -> str:
    """Returns the page as text."""
    lines = [HEAD, *section("config", TrainConfig, freeze(TrainConfig, default())), METHOD_HEAD]
    for name, recipe in METHODS.items():
        hints = ranges.hints(recipe.settings)
        lines += [f"### {name}", "", described(recipe.settings).prose, ""]
        lines += [*table(recipe.settings, recipe.settings(), hints), ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
    print(FILE)
