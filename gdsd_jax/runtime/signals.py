"""Signals that ask a run to end."""

from __future__ import annotations

import signal

_received = signal.SIGTERM  # the last signal that asked this process to end; until then, what another process may get


def exit_code() -> int:
    """Returns the exit code of a command that has saved and left before its end.

    It is 0 after SIGTERM, by which schedulers ask for a clean end, and 130 after Ctrl-C, as for every other command.
    """
    return 0 if _received == signal.SIGTERM else 128 + _received


class StopSignal:
    """Turns SIGTERM and SIGINT, while it is open, into a request to save and leave after the running iteration."""

    def __enter__(self) -> StopSignal:
        self.requested = False
        self._before = {number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: object) -> None:
        global _received
        self.requested, _received = True, number
