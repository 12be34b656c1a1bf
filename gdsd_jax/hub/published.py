"""Gives the sizes of published models by the name of their directory, for use before a checkpoint is downloaded."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gdsd_jax.denoiser import DenoiserConfig
from gdsd_jax.families import FAMILIES
from gdsd_jax.hub.declared import read_config
from gdsd_jax.runtime.errors import UserError

PUBLISHED = {name: config for family in FAMILIES.values() for name, config in family.published.items()}
LLADA_8B, DREAM_7B = PUBLISHED["LLaDA-8B-Instruct"], PUBLISHED["Dream-v0-Instruct-7B"]


def architecture(directory: str | os.PathLike, overrides: Mapping[str, Any] | None = None) -> DenoiserConfig:
    """Returns a checkpoint's configuration: from its `config.json` or, if that is absent, from its directory's name.

    Raises:
      UserError: there is no `config.json`, and the last part of the path is not the name of a published model.
    """
    directory = Path(directory)
    if (directory / "config.json").is_file():
        return read_config(directory, overrides)
    if directory.name not in PUBLISHED:
        raise UserError(
            f"config.checkpoint {directory} is not there, and {directory.name!r} is no published model whose sizes are "
            f"known ({', '.join(PUBLISHED)})"
        )
    published = PUBLISHED[directory.name]
    fields = {field.name for field in dataclasses.fields(published)}
    changes = {key: value for key, value in (overrides or {}).items() if value is not None and key in fields}
    return dataclasses.replace(published, **changes)
