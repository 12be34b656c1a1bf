"""Signals that ask a run to end."""

from __future__ import annotations

import os
import signal

from gdsd_jax.runtime.errors import UserError

# A launcher sets this variable to an exit code by which it tells a run that was stopped from one that is done.
STOPPED = "GDSD_STOPPED_EXIT_CODE"

_asked = False  # whether a signal has asked this process to end since the last StopSignal was opened
_received = signal.SIGTERM  # the last signal that asked this process to end; until then, what another process may get


def exit_code() -> int:
    """Returns the exit code of a command that has saved and left before its end.

    After SIGTERM, by which schedulers ask for a clean end, it is 0, or what the variable `STOPPED` holds. After Ctrl-C
    it is 130, as for every other command.

    Raises:
      UserError: the variable holds no exit code.
    """
    code = os.environ.get(STOPPED) or "0"
    if not (code.isascii() and code.isdigit() and int(code) < 256):
        raise UserError(f"{STOPPED}={code} is no exit code: set it to a number from 0 to 255, or not at all")
    return int(code) if _received == signal.SIGTERM else 128 + _received


def asked_to_stop() -> bool:
    """Returns whether a signal has arrived since the last `StopSignal` was opened, even after its loop last looked."""
    return _asked


class StopSignal:
    """Turns SIGTERM and SIGINT, while it is open, into a request to save and leave after the running iteration."""

    def __enter__(self) -> StopSignal:
        global _asked
        exit_code()  # what the environment holds is checked before the run begins
        self.requested = _asked = False
        self._before = {number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: object) -> None:
        global _asked, _received
        self.requested, _asked, _received = True, True, number
