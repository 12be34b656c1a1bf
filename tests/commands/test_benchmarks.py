"""The benches: PyTorch samples the same tokens, every bench runs, and its figures are right."""

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import accelerator, adapter_slope, measure, rewards, sampler, update
from benchmarks.arguments import number, one_of, several
from benchmarks.side_by_side import Arm
from benchmarks.workloads import WORKLOADS
from gdsd_jax.runtime import ranges
from gdsd_jax.tasks import resolve

ROOT = Path(__file__).parents[2]


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
@pytest.mark.parametrize(
    ("bench", "workload", "flags", "count"),
    [
        # Without torch.compile, which takes a minute and a C++ compiler.
        ("sampler", "tiny", ["--references=torch", "--temperatures=1"], 6),
        ("update", "tiny", ["--references=torch"], 3),
        ("load", "tiny", [], 2),
        ("rewards", "code", [], 3),
    ],
)
def test_a_bench_reports_every_contestant(tmp_path, bench, workload, flags, count):
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", f"benchmarks.{bench}", f"--workloads={workload}", "--turns=2", f"--json={file}"]
    run = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True, check=True)
    rows = json.loads(file.read_text())
    assert len(rows) == count and run.stdout.count(f"| {workload}") == count
    for row in rows:
        assert row["cpu_seconds"] > 0 and row["wall_seconds"] > 0 and row["peak_rss_bytes"] > 1e7
        assert row["ratio"] == pytest.approx(row["reference_cpu_seconds"] / row["cpu_seconds"])
    assert {row["reference_cpu_seconds"] for row in rows} == {rows[0]["cpu_seconds"]}


@pytest.mark.slow
def test_variants_of_another_checkout_take_turns_too(tmp_path):
    """They run in its directory, with the environment of its benches; the reference is of this checkout alone."""
    before = tmp_path / "before"
    shutil.copytree(ROOT / "benchmarks", before / "benchmarks")
    (before / "gdsd_jax").symlink_to(ROOT / "gdsd_jax")
    with (before / "benchmarks" / "measure.py").open("a") as file:
        file.write("\nENVIRONMENT['LATE'] = 'yes'\n")
    bench = before / "benchmarks" / "load.py"
    asserted = "import os\nimport tempfile\nassert os.environ['LATE'] == 'yes'\n"
    bench.write_text(bench.read_text().replace("import tempfile\n", asserted))
    command = ["-m", "benchmarks.load", "--workloads=tiny", "--turns=2", f"--against={before}"]
    run = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.findall(r"^\| tiny \| (.+?) \|", run.stdout, re.M) == ["torch", "load", "load of before"]


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(argparse.ArgumentTypeError, match="is no checkout of this project"):
        measure.checkout(str(tmp_path))
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (tmp_path / "benchmarks" / "measure.py").write_text("import no_such_module\n")
    with pytest.raises(argparse.ArgumentTypeError, match="cannot be imported here: .*'no_such_module'"):
        measure.checkout(str(tmp_path))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workloads=W3"], "'W3' is not one of W1, W2, 8B, tiny"),
        (["--variants=updat"], "did you mean update?"),
        (["--references=jax"], "'jax' is not one of torch, torch.compile, torch.lean, update"),
        (["--variants=torch,update"], "torch is both a reference and a variant"),
        (["--json=/proc/none/rows.json"], "--json"),
    ],
)
def test_bad_flags_of_a_bench_are_refused_before_it_measures(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["update", *flags])
    monkeypatch.setattr(measure, "race", None)
    with pytest.raises(SystemExit) as left:
        measure.main(update.BENCH)
    assert left.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["torch.lean", "torch.float64"])
def test_pytorch_in_other_ways_samples_the_same_tokens_too(variant):
    plain, other = (sampler.prepare(measure.Job("tiny", name, 0.0)).work() for name in ("torch", variant))
    np.testing.assert_array_equal(plain, other)


@pytest.mark.parametrize("name", rewards.COUNTS)
def test_half_of_the_completions_that_are_rewarded_are_right(name, monkeypatch):
    """The bench rewards right and wrong answers in turn, as it says."""
    monkeypatch.setitem(rewards.COUNTS, name, 4)
    task, pairs = resolve(name), rewards.items(name)
    scores = task.rewards([completion for completion, _ in pairs], [row for _, row in pairs])
    component = scores[{"code": "tests"}.get(name, list(task.weights)[0])]
    assert component[0] == component[2] > component[1]


def test_cpu_seconds_count_processes_that_still_run():
    before = measure.cpu_seconds()
    child = subprocess.Popen(
        [sys.executable, "-c", "import time\nwhile time.process_time() < 1: pass\nprint(flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    child.stdout.readline()
    running = measure.cpu_seconds() - before
    child.communicate(b"\n")
    assert 0.9 < running <= measure.cpu_seconds() - before + 0.05


def test_spread_is_half_the_distance_of_the_quartiles():
    contestant = object.__new__(measure.Contestant)
    contestant.turns = [{"cpu_seconds": value} for value in (1.0, 2.0, 3.0, 4.0, 50.0)]
    assert contestant.median("cpu_seconds") == 3.0
    assert contestant.spread("cpu_seconds") == 1.0


@pytest.mark.slow
def test_bfloat16_sees_an_adapter_from_its_first_update_on():
    """At the recipes' learning rate; with the base's product rounded first it is 0.09 and 0.21."""
    found = dict(adapter_slope.slopes(6, 256, 32, (1, 8), 3e-6, ways=("once, float32 sum",)))["once, float32 sum"]
    for updates, (slope, error) in found.items():
        assert slope > 0.9 and error < 0.1, (updates, slope, error)


@pytest.mark.slow
def test_the_bench_for_accelerators_reports_every_part(tmp_path):
    """In small, on a CPU: what it computes, the checkpoint that it writes and reads, and the run on that checkpoint."""
    file, parts = tmp_path / "rows.json", "product,full,dual,update,disk,train"
    rows = accelerator.main(["--tiny", f"--workdir={tmp_path}", f"--parts={parts}", f"--json={file}"])
    assert [row["part"] for row in rows] == parts.split(",") and rows == json.loads(file.read_text())
    assert not any("error" in row for row in rows)
    for row in rows[1:4]:
        assert row["flops_needed"] > 0 and 0 < row["seconds"] <= row["worst_seconds"] < row["first_seconds"]
    assert rows[-1]["export_seconds"] > 0 and "iteration 2" in rows[-1]


@pytest.mark.slow
def test_the_bench_for_accelerators_times_pytorch_beside_ours(tmp_path):
    pytest.importorskip("peft")
    rows = accelerator.main(["--tiny", f"--workdir={tmp_path}", "--parts=product,torch"])
    assert [row["part"] for row in rows[1:]] == [
        "torch step, eager", "torch step, compiled", "torch step with LoRA, eager", "torch step with LoRA, compiled",
        "torch update",
    ]  # fmt: skip
    assert all(row["seconds"] > 0 for row in rows[1:])


@pytest.mark.parametrize(
    ("read", "text", "said"),
    [
        (number(ranges.Positive), "1e-3,x", "'x' must be a number, above 0"),
        (number(ranges.Positive), "nan", "'nan' must be"),
        (number(ranges.Seed), "", "'' must be a whole number"),
        (one_of(("exact", "dual")), "exat", "did you mean exact?"),
        (Arm.of, "gdsd", "METHOD=SEEDS, such as gdsd=5"),
    ],
)
def test_a_bad_value_of_a_flag_is_named(read, text, said):
    with pytest.raises(argparse.ArgumentTypeError, match=re.escape(said)):
        several(read)(text)


def test_ctrl_c_ends_a_bench_with_one_line():
    script = "import sys; sys.orig_argv[1:] = ['-m', 'benchmarks.x']; import benchmarks; raise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_ways_of_adding_an_adapter_agree():
    """Every way computes the same product of a matrix that is not square, up to rounding."""
    draws = np.random.default_rng(0)
    x, w, addend = (jnp.asarray(draws.standard_normal(size), jnp.float32) for size in ((5, 6), (4, 6), (5, 4)))
    for way in adapter_slope.WAYS.values():
        np.testing.assert_allclose(way(x, w, (addend,), jax.lax.Precision.HIGHEST), x @ w.T + addend, atol=1e-5)
    assert set(adapter_slope.product_seconds(8, (16, 32), 2)) == set(adapter_slope.WAYS)
