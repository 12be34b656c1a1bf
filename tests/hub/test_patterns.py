"""Regular expressions from files: matched as PEFT matches them, and stopped where they take too long or too much."""

import time

import pytest

from gdsd_jax.hub import patterns
from gdsd_jax.runtime.errors import UserError

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "lm_head"]


def test_whole_names_match():
    assert patterns.matching(r".*\.(q|down)_proj", NAMES, "it") == NAMES[:2]
    assert patterns.matching("q_proj", NAMES, "it") == []


@pytest.mark.parametrize(
    ("pattern", "said"),
    [(r"(\w+\.?)+!", "takes more than 0.5 s"), ("(", "is no regular expression"), ("a{9999999999}", "too large")],
    ids=["backtracking", "syntax", "number"],
)
def test_others_are_refused_in_one_line(pattern, said, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.5 if "more" in said else patterns.SECONDS)
    start = time.monotonic()
    with pytest.raises(UserError, match=f"it: target_modules .*{said}"):
        patterns.matching(pattern, ["a" * 60], "it: target_modules")
    assert time.monotonic() - start < patterns.SECONDS + 5
