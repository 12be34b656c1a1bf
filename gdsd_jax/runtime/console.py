"""The console of all commands."""

import rich.console


class Console(rich.console.Console):
    """Writes to the terminal as rich does, and ends the command as `gdsd_jax.runtime.front` says if nobody reads it."""

    def on_broken_pipe(self) -> None:
        """Raises the BrokenPipeError that is being handled; rich itself would end the process with exit code 1."""
        raise
