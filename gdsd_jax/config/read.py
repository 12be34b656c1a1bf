"""Reads config files: Python modules with a `get_config`, which may import their neighbours in the same directory."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict

from gdsd_jax.config.freeze import with_open_settings
from gdsd_jax.runtime.errors import UserError


def neighbours(file: str | Path) -> None:
    """Lets a config file, and what it names as `module:NAME`, be a module of the config file's own directory.

    The directory goes to the end of Python's path, so that it hides no installed package. Worker processes get the path
    of the process that starts them.
    """
    directory = str(Path(file).resolve().parent)
    if directory not in sys.path:
        sys.path.append(directory)


def config_module(file: str | Path) -> ModuleType:
    """Returns a config file as a module.

    Raises:
      UserError: there is no such file.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"config file {path} does not exist: change its name")
    neighbours(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"config file {path} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_config(name: str | Path) -> ConfigDict:
    """Returns the ConfigDict of `FILE.py`, or of `FILE.py:RUN` as `--config` takes it, for editing and `freeze`.

    Settings of methods and tasks have no fixed names, so those two mappings are left open for new ones.
    """
    file, colon, run = str(name).partition(":")
    get_config = config_module(file).get_config
    return with_open_settings(get_config(run) if colon else get_config())
