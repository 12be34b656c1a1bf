"""Worker processes: limits that hold, workers that die, and no JAX in them."""

import dataclasses
import functools
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import worker_scores as scores

from gdsd_jax.runtime.errors import UserError
from gdsd_jax.tasks import TASKS, configure, workers
from gdsd_jax.tasks.workers import Limits, Workers, check_importable

LIMITS = Limits(seconds=1.0, megabytes=512, processes=2)


@pytest.fixture(scope="module")
def pool():
    pool = Workers(LIMITS)
    yield pool
    pool.close()


def items(*completions: str) -> list[tuple]:
    return [(completion, {}) for completion in completions]


def test_values_come_back_in_order(pool):
    texts = ["x" * (i % 7) for i in range(50)]
    outcomes = pool.map(scores.length, [(text, {"more": i}) for i, text in enumerate(texts)])
    assert [outcome.values for outcome in outcomes] == [{"length": len(t) + i} for i, t in enumerate(texts)]
    assert pool.map(scores.length, []) == []
    assert pool.map(scores.length, items("\ud800\0"))[0].values == {"length": 2.0}


def test_workers_are_other_processes_without_jax(pool):
    found = [outcome.values for outcome in pool.map(scores.process, items("", "", "", ""))]
    assert {values["jax"] for values in found} == {values["jaxlib"] for values in found} == {0.0}
    assert os.getpid() not in {values["id"] for values in found}


@pytest.mark.parametrize("kind", ["loop", "deaf", "power", pytest.param("sleep", marks=pytest.mark.slow)])
def test_an_item_over_its_time_is_lost_and_no_other(pool, kind, monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 10 if kind == "sleep" else workers.PATIENCE)
    outcomes = pool.map(scores.hang, items("a", kind, "b", "c"))
    assert [outcome.lost for outcome in outcomes] == [False, True, False, False]
    assert outcomes[1].values is None and outcomes[1].error == "over 1 s"
    assert [outcome.values for outcome in outcomes if not outcome.lost] == [{"length": 1.0}] * 3


@pytest.mark.parametrize(("kind", "code"), [("exit", 3), ("segfault", -signal.SIGSEGV)])
def test_a_worker_that_dies_loses_its_item_and_no_other(pool, kind, code):
    outcomes = pool.map(scores.die, items("a", kind, "b", "c"))
    assert [outcome.lost for outcome in outcomes] == [False, True, False, False]
    assert outcomes[1].error == f"ended its worker (exit code {code})"


def test_output_of_a_score_goes_nowhere(pool, capfd):
    assert pool.map(scores.die, items("noise"))[0].values == {"length": 5.0}
    assert capfd.readouterr().out == ""


def test_workers_killed_while_idle_are_replaced(pool):
    for outcome in pool.map(scores.process, items("", "", "", "")):
        try:
            os.kill(int(outcome.values["id"]), signal.SIGKILL)
        except ProcessLookupError:
            continue  # both items of one worker
    time.sleep(0.2)
    assert not any(outcome.lost for outcome in pool.map(scores.process, items(*"abcd")))


def test_memory_is_bounded(pool):
    outcomes = pool.map(scores.memory, items("bomb", "fine"))
    assert outcomes[0] == outcomes[0]._replace(values=None, error="out of memory", lost=True)
    assert outcomes[1].values["length"] == 4


def test_a_worker_that_grows_is_replaced_before_it_is_full():
    pool = Workers(dataclasses.replace(LIMITS, processes=1))
    outcomes = pool.map(scores.memory, items(*["leak"] * 8))
    pool.close()
    assert not any(outcome.lost for outcome in outcomes)
    assert len({outcome.values["id"] for outcome in outcomes}) == 3  # three of 100 MB pass half of 512 MB


def test_what_a_score_raises_is_reported(pool):
    (raised,) = pool.map(scores.raising, items("luck"))
    assert (raised.error, raised.lost) == ("ValueError('no luck')", False)
    (wrong,) = pool.map(scores.wrong, items(""))
    assert "could not convert" in wrong.error and not wrong.lost


def test_only_functions_that_workers_can_import():
    check_importable(scores.length)
    for function in (lambda completion, row: {}, functools.partial(scores.length)):
        with pytest.raises(UserError, match="cannot run in worker processes"):
            check_importable(function)
    with pytest.raises(UserError, match="cannot run in worker processes"):
        dataclasses.replace(TASKS["sudoku"], score=lambda completion, row: {}, limits=LIMITS)


def test_a_task_scores_in_workers(caplog):
    mixed = dataclasses.replace(
        TASKS["sudoku"], name="mixed", score=scores.hang, measure=scores.hang, weights={"length": 2.0},
        metrics_named=("length",), limits=LIMITS,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        components = mixed.rewards(["abc", "loop", ""], [{}, {}, {}])
    np.testing.assert_array_equal(components["length"], [3, 0, 0])
    assert "mixed: 1 of 3 completions could not be scored; the first: over 1 s" in caplog.text
    np.testing.assert_array_equal(mixed.reward(["abc", "loop"], [{}, {}]), [6, 0])
    np.testing.assert_array_equal(mixed.metrics(["abc", "loop"], [{}, {}])["length"], [3, 0])
    assert configure(mixed, weights={"length": 1.0}).reward(["ab"], [{}]) == 2


@pytest.mark.parametrize("kind", ["idle", "power"])
def test_no_worker_outlives_its_parent(tmp_path, kind):
    """A parent that is killed takes its idle workers along at once, and busy ones are ended by the kernel."""
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent("""
        import os, signal, sys, threading, time, worker_scores as scores
        from gdsd_jax.tasks.workers import Limits, Workers
        pool = Workers(Limits(seconds=0.5, processes=1))
        print(int(pool.map(scores.process, [("", {})])[0].values["id"]), flush=True)
        threading.Thread(target=pool.map, args=(scores.hang, [(sys.argv[1], {})]), daemon=True).start()
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
        """)
    )
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ["PYTHONPATH"]])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, script, kind], env=environment, capture_output=True, text=True)
    worker = Path(f"/proc/{int(done.stdout)}/stat")
    deadline = time.monotonic() + 60
    while worker.exists() and worker.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)
