"""The exit code of a run that was stopped, and what a launcher may set it to."""

import os
import signal

import pytest

from gdsd_jax.runtime import signals
from gdsd_jax.runtime.errors import UserError


def stopped_by(number: int) -> int:
    """Returns the exit code of a run that has got this signal."""
    with signals.StopSignal() as stop:
        os.kill(os.getpid(), number)
        assert stop.requested
    return signals.exit_code()


@pytest.mark.parametrize(("setting", "code"), [(None, 0), ("", 0), ("75", 75)])
def test_exit_codes(setting, code, monkeypatch):
    monkeypatch.setattr(signals, "_received", signal.SIGTERM)
    monkeypatch.delenv(signals.STOPPED, raising=False)
    if setting is not None:
        monkeypatch.setenv(signals.STOPPED, setting)
    assert signals.exit_code() == code  # another process got the signal
    assert stopped_by(signal.SIGTERM) == code
    assert stopped_by(signal.SIGINT) == 130


@pytest.mark.parametrize("setting", ["x", "-1", "256", "7²", "0.5"])
def test_a_wrong_code_is_refused_before_the_run_begins(setting, monkeypatch):
    monkeypatch.setenv(signals.STOPPED, setting)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(UserError, match=signals.STOPPED), signals.StopSignal():
        pass
    assert signal.getsignal(signal.SIGTERM) == handler
