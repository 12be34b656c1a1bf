"""The console of all commands."""

from typing import Any

import rich.console


class Console(rich.console.Console):
    """Writes to the terminal as rich does, and ends the command as `gdsd_jax.runtime.front` says if nobody reads it."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        if self.width < 1:
            self.width = 80  # some pseudo-terminals say that they have no columns

    def text(self, text: str) -> None:
        """Prints a text as it is, and divides lines that are too long only on a terminal."""
        self.print(text, highlight=False, markup=False, soft_wrap=not self.is_terminal)

    def on_broken_pipe(self) -> None:
        """Raises the BrokenPipeError that is being handled; rich itself would end the process with exit code 1."""
        raise
