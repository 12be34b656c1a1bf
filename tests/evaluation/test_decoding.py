"""The comparison of ways of decoding: its numbers, and the command that prints them."""

import json

import pytest
import tiny_run
from surroundings import surroundings  # noqa: F401  (a fixture that acts by itself)

from gdsd_jax import evaluate
from gdsd_jax.evaluation import decoding


@pytest.mark.slow
def test_every_way_is_held_against_exact_decoding(tmp_path, monkeypatch, capsys):
    ways = {name: decoding.WAYS[name] for name in ("exact", "dual", "threshold 0.9")}
    monkeypatch.setattr(decoding, "WAYS", ways | {"refreshed": {"cache": "prefix", "refresh_every": 1}})
    file = tiny_run.build(tmp_path)
    command = ["--config", file, "--checkpoint", tmp_path / "base", "--output", tmp_path / "out", "--count", 6]
    command += ["--config.evaluation.batch_rows=4", "--steps", 8]
    tiny_run.command(evaluate, *command, "--compare-decoding")

    rows = {row["decoding"]: row for row in json.loads((tmp_path / "out" / "decoding.json").read_text())}
    assert list(rows) == list(decoding.WAYS)
    for row in rows.values():
        assert row["count"] == 6 and row["task"] == "even" and row["seconds"] > 0
    exact, refreshed, threshold = rows["exact"], rows["refreshed"], rows["threshold 0.9"]
    # There are eight steps of one token; a cache that is refreshed at every step changes nothing.
    assert exact["passes"] == refreshed["passes"] == rows["dual"]["passes"] == 8
    assert exact["equal_tokens"] == refreshed["equal_tokens"] == 1.0
    assert exact["accuracy"] == refreshed["accuracy"]
    assert threshold["passes"] <= 8 and threshold["fewer_passes"] == 8 / threshold["passes"]
    assert exact["faster"] == 1.0 and threshold["faster"] == exact["seconds"] / threshold["seconds"]

    printed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in printed.splitlines() if line.startswith("|"))
    assert (tmp_path / "out" / "decoding.md").read_text().strip() in printed


def test_sampling_flags_are_refused(tmp_path):
    file = tiny_run.build(tmp_path)
    command = ["--config", file, "--checkpoint", tmp_path / "base", "--output", tmp_path / "out"]
    with pytest.raises(SystemExit):
        tiny_run.command(evaluate, *command, "--compare-decoding", "--temperature", 0.5)
    assert not (tmp_path / "out").exists()
