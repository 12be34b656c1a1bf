"""Signals that ask a run to end."""

from __future__ import annotations

import signal


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
        self.requested = True
