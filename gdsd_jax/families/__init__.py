"""Finds the model families, each defined by a file in this folder. Nothing outside a family's file knows its name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from gdsd_jax.denoiser import DenoiserConfig
from gdsd_jax.families.family import Family, Row
from gdsd_jax.runtime.errors import UserError

_SHARED = ("family", "decoder")


def _found() -> dict[str, Family]:
    files = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED)
    families = [family for file in files for family in importlib.import_module(f"{__name__}.{file}").FAMILIES]
    return {family.name: family for family in families}


FAMILIES: dict[str, Family] = _found()


def family_named(name: str) -> Family:
    """Returns the family of this name.

    Raises:
      UserError: no such family.
    """
    if name not in FAMILIES:
        raise UserError(f"unknown model family {name!r}: use one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_of(config: DenoiserConfig) -> Family:
    """Returns the family of `config.family`; raises UserError if there is none."""
    return family_named(config.family)


def family_of_type(model_type: Any) -> Family:
    """Returns the family whose `config.json` has this `model_type`.

    Raises:
      UserError: no such family.
    """
    found = next((family for family in FAMILIES.values() if family.model_type == model_type), None)
    if found is None:
        known = ", ".join(sorted(family.model_type for family in FAMILIES.values()))
        experts = " (a mixture of experts, which is not computed)" if "moe" in str(model_type).lower() else ""
        raise UserError(f"unknown model_type {model_type!r} in config.json{experts}: this denoiser reads {known}")
    return found


def read_config(hf: Mapping[str, Any]) -> DenoiserConfig:
    """Reads the mapping of a `config.json`.

    Raises:
      UserError: unknown `model_type`, an architecture option that this denoiser does not compute, a missing key.
    """
    model_type = hf.get("model_type")
    family = family_of_type(model_type)
    if hf.get("quantization_config"):
        raise UserError(
            "config.json has a quantization_config, so its weights are rounded in a form that is not read here: take "
            "the checkpoint in floats; config.model.weights=int8 rounds it while it is read"
        )
    try:
        return family.read(hf)
    except KeyError as error:
        key = error.args[0]
        remedy = f": set config.checkpoint_overrides.{key}" if str(key).endswith("_token_id") else ""
        raise UserError(f"config.json of model_type {model_type!r} lacks the key {key!r}{remedy}") from None
    except UserError:
        raise
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"config.json of model_type {model_type!r} holds an unusable value: {error}") from None


__all__ = ["FAMILIES", "Family", "Row", "family_named", "family_of", "family_of_type", "read_config"]
