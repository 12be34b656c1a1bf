"""Errors that a user can act on."""


class UserError(ValueError):
    """A bad input; the message is one line that names the cause and the setting or file to change.

    Commands print it without a traceback and leave with exit code 2.
    """


class PackageError(UserError, ImportError):
    """A package that only some users need is not installed."""
