"""The table of methods, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from gdsd_jax.methods import (
    agrpo,
    coupled_grpo,
    dmpo,
    egspo,
    espo,
    exact_pg,
    gdpo,
    gdsd,
    grpo,
    just_grpo,
    rspo,
    spg,
    stable_drl,
    teacher,
    tracerl,
    trafl,
    unigrpo,
    wd1,
)  # fmt: skip
from gdsd_jax.methods.method import Method
from gdsd_jax.runtime import ranges
from gdsd_jax.runtime.errors import UserError, did_you_mean
from gdsd_jax.runtime.plugins import is_plugin, load_plugin


class Recipe(NamedTuple):
    """A settings dataclass and the function that makes a `Method` from its values."""

    settings: type
    make: Callable[[Any], Method]


METHODS: dict[str, Recipe] = {
    "gdsd": Recipe(gdsd.Guidance, gdsd.make),
    "gdsd_tlc": Recipe(gdsd.Centred, gdsd.make),
    "gdsd_teacher": Recipe(teacher.Teacher, teacher.make),
    "espo": Recipe(espo.Settings, espo.make),
    "spg": Recipe(spg.Settings, spg.make),
    "diffu_grpo": Recipe(grpo.Settings, grpo.make),
    "wd1": Recipe(wd1.Settings, wd1.make),
    "coupled_grpo": Recipe(coupled_grpo.Settings, coupled_grpo.make),
    "unigrpo": Recipe(unigrpo.Settings, unigrpo.make),
    "dmpo": Recipe(dmpo.Settings, dmpo.make),
    "tracerl": Recipe(tracerl.Settings, tracerl.make),
    "exact_pg": Recipe(exact_pg.Settings, exact_pg.make),
    "just_grpo": Recipe(just_grpo.Settings, just_grpo.make),
    "stable_drl": Recipe(stable_drl.Settings, stable_drl.make),
    "agrpo": Recipe(agrpo.Settings, agrpo.make),
    "egspo": Recipe(egspo.Settings, egspo.make),
    "gdpo": Recipe(gdpo.Settings, gdpo.make),
    "rspo": Recipe(rspo.Settings, rspo.make),
    "trafl": Recipe(trafl.Settings, trafl.make),
}


def build(name: str, /, **settings: Any) -> Method:
    """Builds the method that a name of `METHODS`, or `package.module:NAME` of a `Recipe`, denotes.

    Raises:
      UserError: the method or a setting is unknown, or a setting is out of its range.
    """
    if is_plugin(name):
        recipe = load_plugin(name, "config.method")
        if not isinstance(recipe, Recipe):
            raise UserError(f"config.method {name!r} is a {type(recipe).__name__}, not a gdsd_jax.methods.Recipe")
    elif name in METHODS:
        recipe = METHODS[name]
    else:
        names = f"{', '.join(METHODS)}, or package.module:NAME{did_you_mean(name, METHODS)}"
        raise UserError(f"unknown method {name!r}: config.method is one of {names}")
    known = {field.name for field in dataclasses.fields(recipe.settings)}
    unknown = sorted(set(settings) - known)
    if unknown:
        names = f"{', '.join(sorted(known))}{did_you_mean(unknown[0], known)}"
        raise UserError(f"method {name!r} has no setting {', '.join(unknown)}: it knows {names}")
    return recipe.make(ranges.build(recipe.settings, settings, f"config.settings.{name}"))
