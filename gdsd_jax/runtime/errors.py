"""Errors that a user can act on."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A bad input; the message is one line that names the cause and the setting or file to change.

    Commands print the message without a traceback and exit with code 2.
    """


class PackageError(UserError, ImportError):
    """A package that only some users need is not installed."""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Returns the end of a message about an unknown name: "; did you mean OTHER?" if a known name is spelt alike."""
    alike = difflib.get_close_matches(str(name), list(known), 1)
    return f"; did you mean {alike[0]}?" if alike else ""
