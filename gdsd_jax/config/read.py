"""Reads config files: Python modules with a `get_config`, which may import their neighbours in the same directory."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from gdsd_jax.config.freeze import with_open_settings
from gdsd_jax.runtime.errors import UserError


def neighbours(file: str | Path) -> None:
    """Lets a config file import modules of its own directory and name their contents as `module:NAME`.

    It appends the directory to `sys.path`, so that no module there hides an installed package. Worker processes inherit
    the path of the process that starts them.
    """
    directory = str(Path(file).resolve().parent)
    if directory not in sys.path:
        sys.path.append(directory)


def config_module(file: str | Path) -> ModuleType:
    """Imports a config file and returns it as a module.

    Raises:
      UserError: the file does not exist or is not a Python file.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"config file {path} does not exist: name another file")
    neighbours(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"config file {path} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_config(name: str | Path) -> ConfigDict:
    """Returns the ConfigDict of `FILE.py`, or of `FILE.py:RUN` as `--config` accepts it, for editing and `freeze`.

    The settings of methods, task and optimizers have no fixed names, so their mappings accept new keys.

    Raises:
      UserError: the file does not exist, or defines no `get_config` that returns a ConfigDict.
    """
    file, colon, run = str(name).partition(":")
    module = config_module(file)
    if not hasattr(module, "get_config"):
        raise UserError(f"config file {file} has no function get_config: define one that returns the config")
    config = module.get_config(run) if colon else module.get_config()
    require_config(config, file)
    return with_open_settings(config)


def require_config(config: Any, file: str) -> None:
    """Raises UserError unless `config`, which `get_config` of `file` returned, is a ConfigDict."""
    if not isinstance(config, ConfigDict):
        made = type(config).__name__
        raise UserError(f"{file}: get_config returns a {made}, not the ConfigDict that gdsd_jax.config.default makes")
