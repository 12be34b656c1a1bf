"""Provides a fixture for tests that run commands in the process of the tests."""

import signal

import pytest


@pytest.fixture(scope="module", autouse=True)
def surroundings(quick_compilation):
    """Restores the signal handlers that training replaces."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)
