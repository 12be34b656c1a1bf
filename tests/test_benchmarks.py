"""The benches: PyTorch samples the same tokens, the machinery runs, its figures are what they say."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import measure, sampler, update
from benchmarks.workloads import WORKLOADS

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_pytorch_samples_the_same_tokens():
    theirs, ours = (sampler.prepare(measure.Job("tiny", variant, 0.0)).work() for variant in ("torch", "exact"))
    assert (ours != WORKLOADS["tiny"].mask_id).all()
    np.testing.assert_array_equal(theirs, ours)


@pytest.mark.slow
def test_pytorch_minimises_the_same_loss():
    """At the first update old is new: the loss is the mean squared advantage, whatever the masks are."""
    theirs, ours = (update.prepare(measure.Job("tiny", variant)).work for variant in ("torch", "update"))
    expected = (update.batch(WORKLOADS["tiny"])[1] ** 2).mean()
    np.testing.assert_allclose([theirs(), ours()], expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("bench", "flags", "count"), [("sampler", ["--temperatures=0"], 4), ("update", [], 3)])
def test_a_bench_reports_every_contestant(tmp_path, bench, flags, count):
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", f"benchmarks.{bench}", "--workloads=tiny", "--turns=2", f"--json={file}"]
    # Without torch.compile, which takes a minute and a C++ compiler.
    command += ["--references=torch", *flags]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = json.loads(file.read_text())
    assert len(rows) == count and run.stdout.count("| tiny") == count
    for row in rows:
        assert row["cpu_seconds"] > 0 and row["wall_seconds"] > 0 and row["peak_rss_bytes"] > 1e7
        assert row["ratio"] == pytest.approx(row["reference_cpu_seconds"] / row["cpu_seconds"])
    assert min(r["cpu_seconds"] for r in rows if r["variant"] in measure.REFERENCES) == rows[0]["reference_cpu_seconds"]


def test_spread_is_half_the_distance_of_the_quartiles():
    contestant = object.__new__(measure.Contestant)
    contestant.turns = [{"cpu_seconds": value} for value in (1.0, 2.0, 3.0, 4.0, 50.0)]
    assert contestant.median("cpu_seconds") == 3.0
    assert contestant.spread("cpu_seconds") == 1.0
