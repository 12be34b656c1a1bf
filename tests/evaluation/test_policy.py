"""An adapter of another base is refused or only reported, as the setting says."""

import dataclasses

import pytest

from gdsd_jax.config import TrainConfig, default, freeze
from gdsd_jax.evaluation import policy
from gdsd_jax.runtime.errors import UserError

CERTAIN, NAMED = ("it differs", True), ("it differs", False)


@pytest.mark.parametrize(
    ("rule", "found", "refused"),
    [
        ("fingerprint", CERTAIN, True), ("fingerprint", NAMED, False), ("strict", CERTAIN, True),
        ("strict", NAMED, True), ("any", CERTAIN, False), ("any", NAMED, False), ("strict", None, False),
    ],
)  # fmt: skip
def test_the_setting_decides(rule, found, refused, monkeypatch, capsys):
    monkeypatch.setattr(policy.hub, "another_base", lambda adapter, checkpoint: found)
    if refused:
        with pytest.raises(UserError, match="it differs.*set config.adapter_base to any"):
            policy.require_base("adapter", "base", rule)
    else:
        policy.require_base("adapter", "base", rule)
        assert bool(capsys.readouterr().err) == (found is not None)


def test_an_unknown_rule_is_refused():
    with pytest.raises(UserError, match="config.adapter_base 'maybe' is not one of fingerprint, strict, any"):
        dataclasses.replace(freeze(TrainConfig, default("base")), adapter_base="maybe")
    with pytest.raises(UserError, match="adapter_base of --model_args 'maybe' is not one of"):
        policy.require_base("adapter", "base", "maybe", "adapter_base of --model_args")
