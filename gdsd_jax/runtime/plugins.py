"""Objects of a user's own modules, named in a setting as `package.module:NAME`."""

from __future__ import annotations

import importlib
from typing import Any

from gdsd_jax.runtime.errors import UserError


def is_plugin(name: str) -> bool:
    """Returns whether a name has the form `package.module:NAME`."""
    return ":" in name


def load_plugin(name: str, setting: str) -> Any:
    """Imports the object that `package.module:NAME` names.

    Args:
      setting: the setting that holds the name; error messages name it.

    Raises:
      UserError: the module cannot be imported, or it has no such attribute.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # a module is a program
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            reason += ", looked for in the current directory, beside the config file and in PYTHONPATH"
        raise UserError(f"{setting} {name!r} cannot be imported: {reason}") from error
