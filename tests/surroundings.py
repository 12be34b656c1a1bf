"""A fixture for tests that run commands in their own process."""

import signal

import pytest


@pytest.fixture(scope="module", autouse=True)
def surroundings(quick_compilation):
    """Gives back the signals that training takes over."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)
