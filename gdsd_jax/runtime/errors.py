"""Errors that a user can act on."""


class UserError(ValueError):
    """A bad input; the message is one line that names the cause and the setting or file to change.

    Commands print the message without a traceback and exit with code 2.
    """


class PackageError(UserError, ImportError):
    """A package that only some users need is not installed."""
