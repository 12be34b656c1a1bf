"""One run on meshes of eight devices, in one, two and four processes: what it samples, learns, saves and survives.

Every run is a process of its own: the number of devices is fixed when JAX starts. `make test-multi` runs this file.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import multi_run
import numpy as np
import pytest

pytestmark = pytest.mark.slow

TESTS = Path(__file__).resolve().parents[1]
MESHES = ((8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4))
ONE = (1, 1, 1)
PATIENCE = 900


def flags(file: Path, workdir: Path, mesh: tuple[int, int, int], **settings) -> list[str]:
    sizes = {f"mesh.{axis}": size for axis, size in zip(("data", "fsdp", "tensor"), mesh, strict=True)}
    chosen = [f"--config.{name}={value}" for name, value in (sizes | settings).items()]
    return ["--config", str(file), "--workdir", str(workdir), *chosen]


def launch(devices: int, record: Path, *runs: list[str], log: Path, **environment: str) -> subprocess.Popen:
    """Starts `multi_run` in the background; what it prints goes to the log."""
    command = [sys.executable, str(TESTS / "multi_run.py"), str(devices), str(record)]
    command += [part for run in runs for part in ("--", *run)]
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | environment)


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("localhost", 0))
        return held.getsockname()[1]


def hosts(processes: int) -> list[dict[str, str]]:
    """What the environment of each process says of the job."""
    job = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": str(processes)}
    return [job | {"JAX_PROCESS_ID": str(index)} for index in range(processes)]


def start_job(processes: int, record: Path, run: list[str], **environment: str) -> list[tuple[subprocess.Popen, Path]]:
    """The processes of one job on eight devices, with their logs."""
    started = []
    for index, host in enumerate(hosts(processes)):
        log = record.with_name(f"{record.name}_{index}.log")
        started.append((launch(8 // processes, record, run, log=log, **host, **environment), log))
    return started


def finish(job: list[tuple[subprocess.Popen, Path]]) -> None:
    """Waits for a job that must succeed."""
    try:
        for process, log in job:
            assert process.wait(timeout=PATIENCE) == 0, log.read_text()[-5000:]
    finally:
        for process, _ in job:
            process.kill()


def read(record: Path, number: int = 0) -> dict[str, np.ndarray]:
    with np.load(f"{record}_{number}.npz") as arrays:
        return dict(arrays)


def metrics(workdir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]


def check_same(found: dict, expected: dict) -> None:
    """Tokens, and with them the order of the data, exactly; adapters to 1e-5."""
    assert set(found) <= set(expected) and "adapter0" in found
    for name in found:
        if name in ("rollouts", "greedy"):
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
        elif name.startswith("adapter"):
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-5, err_msg=name)


def check_same_record(workdir: Path, expected: Path, steps: int) -> None:
    """The files of the first iterations: completions and rewards exactly, the other metrics to 1e-5."""
    lines, expected_lines = metrics(workdir), metrics(expected)[:steps]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    for line, other in zip(lines, expected_lines, strict=True):
        # What is measured of the last iteration alone depends on which one that is.
        shared = [name for name in line if not name.startswith("eval/") or name in other]
        assert set(shared) >= {name for name in other if not name.startswith("eval/")}
        for name in shared:
            np.testing.assert_allclose(line[name], other[name], rtol=1e-5, atol=1e-5, err_msg=name)
    rows = [(directory / "completions.jsonl").read_bytes().splitlines() for directory in (workdir, expected)]
    assert rows[0] == rows[1][: len(rows[0])] and len(rows[0]) == 16 * steps


@pytest.mark.parametrize(
    ("family", "meshes"),
    [("llada", MESHES), ("dream", MESHES), *((name, ((2, 2, 2),)) for name in ("a2d-qwen3", "fast_dllm_qwen", "sdar"))],
)
def test_sharded_equals_unsharded(family, meshes, tmp_path):
    """One iteration: rollout at temperature 1, update, greedy evaluation at temperature 0."""
    file = multi_run.build(tmp_path, family)
    names = ["x".join(map(str, mesh)) for mesh in meshes]
    runs = [flags(file, tmp_path / name, mesh) for name, mesh in zip(names, meshes, strict=True)]
    one = launch(1, tmp_path / "one", flags(file, tmp_path / "whole", ONE), log=tmp_path / "one.log")
    finish([(one, tmp_path / "one.log")])
    finish([(launch(8, tmp_path / "eight", *runs, log=tmp_path / "eight.log"), tmp_path / "eight.log")])
    expected = read(tmp_path / "one")
    assert len(np.unique(expected["rollouts"].reshape(-1, expected["rollouts"].shape[-1]), axis=0)) > 8
    assert max(np.abs(expected[name]).max() for name in expected if name.startswith("adapter")) > 1e-3
    for number, (name, (_, fsdp, tensor)) in enumerate(zip(names, meshes, strict=True)):
        found = read(tmp_path / "eight", number)
        check_same(found, expected)
        # Norms and counters are everywhere, and of the factors of an adapter some are cut along fsdp alone.
        assert found["share_of_base"][0] < 1.1 / (fsdp * tensor) + 0.02
        assert found["share_of_state"] < 1.1 / fsdp
        check_same_record(tmp_path / name, tmp_path / "whole", steps=1)


def test_sharded_equals_unsharded_with_all_that_comes_between(tmp_path):
    """Refilled groups, updates on parts of a rollout, a reference that moves, an adapted KL, rollouts in parts."""
    file = multi_run.build(tmp_path, "llada")
    # Adam turns rounding of gradients near zero into steps of the learning rate: several updates take a small one.
    between = {
        "iterations": 2, "inner_updates": 2, "update_rows": 8, "rollout_rows": 8, "optimizer.learning_rate": 0.002,
        "refill.rounds": 1, "refill.prompts": 4, "refill.select": "multi_run:above_the_mean", "reference.every": 1,
        "reference.decay": 0.5, "reference.kl_target": 1e-6,
    }  # fmt: skip
    for name, devices, mesh in (("one", 1, ONE), ("eight", 8, (2, 2, 2))):
        run = flags(file, tmp_path / f"run_{name}", mesh, **between)
        finish([(launch(devices, tmp_path / name, run, log=tmp_path / f"{name}.log"), tmp_path / f"{name}.log")])
    check_same(read(tmp_path / "eight"), read(tmp_path / "one"))
    check_same_record(tmp_path / "run_eight", tmp_path / "run_one", steps=2)
    # Without a group to replace, a reference that has moved and a KL this would show nothing.
    assert all(line["refill/rows_sampled"] > 16 for line in metrics(tmp_path / "run_one"))
    assert metrics(tmp_path / "run_one")[-1]["policy/kl"] > 0


MESH = (2, 2, 2)


# Rows come up again, and those whose groups were rejected are skipped by all processes alike.
REPEATED = {"task.train_rows": 8, "refill.revisit": 0.25, "refill.select": "multi_run:above_the_mean"}


class Jobs(NamedTuple):
    """One process that ran three iterations on eight devices, and four that were to run two and lost one of them."""

    directory: Path
    file: Path
    expected: dict[str, np.ndarray]
    killed: list[tuple[subprocess.Popen, Path]]
    seconds: float


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("jobs")
    file = multi_run.build(directory, "llada")
    log = directory / "one.log"
    whole = flags(file, directory / "whole", MESH, iterations=3, **REPEATED)
    finish([(launch(8, directory / "one", whole, log=log), log)])
    job = start_job(
        4, directory / "four",
        flags(file, directory / "four", MESH, iterations=2, **REPEATED, **{"hosts.heartbeat_seconds": 15}),
        SIGNAL_SELF=f"3:2:{int(signal.SIGKILL)}",
    )  # fmt: skip
    try:
        assert job[3][0].wait(timeout=PATIENCE) == -signal.SIGKILL, job[3][1].read_text()[-5000:]
        start = time.monotonic()
        for process, _ in job[:3]:
            process.wait(timeout=120)
        seconds = time.monotonic() - start
    finally:
        for process, _ in job:
            process.kill()
    return Jobs(directory, file, read(directory / "one"), job, seconds)


def saved(workdir: Path) -> list[int]:
    return sorted(int(entry.name) for entry in workdir.glob("checkpoints/*") if entry.name.isdigit())


def test_a_killed_process_ends_the_job(jobs):
    assert jobs.seconds < 60
    for process, log in jobs.killed[:3]:
        text = log.read_text()
        assert process.returncode not in (0, None), text[-5000:]
        assert "leaves the job" in text or "another task died" in text, text[-5000:]


@pytest.fixture(scope="module")
def restarted(jobs):
    """The workdir of the killed job after four new processes have finished it."""
    workdir = jobs.directory / "four"
    assert saved(workdir) == [1]
    run = flags(jobs.file, workdir, MESH, iterations=2, **REPEATED)
    finish(start_job(4, jobs.directory / "again", run))
    return workdir


def test_the_restarted_job_goes_on_as_one_process_would(jobs, restarted):
    found = read(jobs.directory / "again")
    np.testing.assert_array_equal(found["rollouts"], jobs.expected["rollouts"][1:2])
    check_same_record(restarted, jobs.directory / "whole", steps=2)
    assert saved(restarted) == [1, 2]
    assert max(line["refill/prompts_skipped"] for line in metrics(jobs.directory / "whole")) > 0


def test_two_processes_resume_and_sigterm_to_one_of_them_saves(jobs, restarted):
    workdir = shutil.copytree(restarted, jobs.directory / "two")
    run = flags(jobs.file, workdir, MESH, iterations=10, **REPEATED)
    job = start_job(2, jobs.directory / "two", run, SIGNAL_SELF=f"1:1:{int(signal.SIGTERM)}")
    finish(job)
    found = read(jobs.directory / "two")
    check_same(found, jobs.expected | {"rollouts": jobs.expected["rollouts"][2:]})
    check_same_record(workdir, jobs.directory / "whole", steps=3)
    assert saved(workdir) == [1, 2, 3]


def test_one_process_resumes_on_another_mesh(jobs, restarted):
    workdir, log = shutil.copytree(restarted, jobs.directory / "other"), jobs.directory / "other.log"
    run = flags(jobs.file, workdir, (1, 4, 2), iterations=3, **REPEATED)
    finish([(launch(8, jobs.directory / "other", run, log=log), log)])
    check_same(read(jobs.directory / "other"), jobs.expected | {"rollouts": jobs.expected["rollouts"][2:]})
    check_same_record(workdir, jobs.directory / "whole", steps=3)


def test_two_saves_at_once_do_not_wait_for_each_other(jobs, tmp_path):
    command = [sys.executable, str(TESTS / "multi_saves.py"), str(jobs.file), str(tmp_path)]
    job = []
    for index, host in enumerate(hosts(4)):
        log = tmp_path / f"{index}.log"
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | host)
        job.append((process, log))
    finish(job)
    assert saved(tmp_path) == [8, 9, 10]
    assert [entry.name for entry in (tmp_path / "best").iterdir()] == ["10"]


def test_a_wrong_mesh_is_refused(jobs, tmp_path):
    log = tmp_path / "refused.log"
    wrong = {
        "mesh": flags(jobs.file, tmp_path / "new", (3, 1, 2)),
        "rows": flags(jobs.file, tmp_path / "new", (8, 1, 1), microbatch_rows=4),
    }
    said = {}
    for name, run in wrong.items():
        assert launch(8, tmp_path / name, run, log=log).wait(timeout=PATIENCE) == 2, log.read_text()
        said[name] = log.read_text().splitlines()[-1]
    assert "nearest mesh that works is data=4,fsdp=1,tensor=2" in said["mesh"]
    assert "does not divide config.microbatch_rows 4; the nearest mesh that works is" in said["rows"]
