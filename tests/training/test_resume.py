"""Killed and resumed runs write what an uninterrupted run writes, bit for bit.

The run to be killed is a process of its own, started as a user starts it and asked for more iterations than it will
live to see: the number of iterations may differ between a run and its resumption.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from gdsd_jax import train as walk
from gdsd_jax.config import TrainConfig, freeze
from gdsd_jax.hub import tiny

# A reward that random weights earn unevenly: the share of letters in what they write.
FILES = {
    "letters.py": """
import dataclasses
from gdsd_jax.tasks import TASKS

def score(completion, row):
    return {"letters": sum(c.isalpha() for c in completion) / 20}

TASK = dataclasses.replace(TASKS["sudoku"], score=score, weights={"letters": 1.0})
""",
    "config.py": """
from pathlib import Path
from gdsd_jax import config as settings

def get_config():
    config = settings.default(checkpoint=str(Path(__file__).parent / "start"))
    with config.unlocked():
        config.task.update(name="letters:TASK", train_rows=32, settings={"template": "{puzzle}", "system": ""})
        config.prompt_buckets = (18,)
        config.model.update(dtype="float32", remat="none")
        config.lora.update(rank=2, alpha=4.0, targets=("v", "down"), dropout=0.0)
        config.sampler.update(completion_length=20, steps=4, block_length=20)
        config.update(prompts_per_iteration=2, group_size=2, inner_updates=2, microbatch_rows=2, save_every=2)
        config.optimizer.update(learning_rate=1e-2)
        config.evaluation.update(count=4, batch_rows=4, evaluation_prompt=False)
        config.iterations = 10**6
    return config
""",
}
PATIENCE = 600


def start(directory: Path, workdir: Path) -> subprocess.Popen:
    config = directory / "config.py"
    command = [sys.executable, "-m", "gdsd_jax.train", "--config", str(config), "--workdir", str(workdir)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(directory), os.environ["PYTHONPATH"]])}
    # As this process compiles, see `runs`.
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    with open(f"{workdir}.log", "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def saved(workdir: Path) -> list[int]:
    """Iterations of the finished checkpoints."""
    return sorted(int(entry.name) for entry in workdir.glob("checkpoints/*") if entry.name.isdigit())


def stopped(directory: Path, workdir: Path, number: signal.Signals) -> int:
    """Runs the command until three iterations and a checkpoint are on disk, sends the signal, returns the exit code."""
    process = start(directory, workdir)
    try:
        end, metrics = time.monotonic() + PATIENCE, workdir / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3 and saved(workdir)):
            assert process.poll() is None and time.monotonic() < end, Path(f"{workdir}.log").read_text()
            time.sleep(0.02)
        process.send_signal(number)
        return process.wait(timeout=PATIENCE)
    finally:
        process.kill()


def written(workdir: Path) -> list[dict]:
    """The complete lines of the metrics, without what the clock measured."""
    lines = (workdir / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def train(directory: Path, workdir: Path, iterations: int) -> Path:
    """Starts or resumes the same run in this process."""
    config = runpy.run_path(str(directory / "config.py"))["get_config"]()
    config.iterations = iterations
    walk.train(freeze(TrainConfig, config), workdir)
    return workdir


class Runs(NamedTuple):
    """A killed run as it lay there, an uninterrupted one of two iterations more, and a function that resumes."""

    directory: Path
    code: int
    lines: list[dict]
    checkpoints: list[int]
    whole: Path
    iterations: int
    train: Callable[[str], Path]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, quick_compilation):
    # Programs that other tests compiled in this process with optimisations round differently.
    jax.clear_caches()
    directory = tmp_path_factory.mktemp("runs")
    tiny.build(directory / "start", hidden_size=32, num_layers=1, num_heads=2, intermediate_size=48)
    for name, text in FILES.items():
        (directory / name).write_text(text)
    killed = directory / "killed"
    code = stopped(directory, killed, signal.SIGKILL)
    lines, checkpoints = written(killed), saved(killed)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(directory)
        iterations = len(lines) + 2
        resume = lambda name: train(directory, directory / name, iterations)  # noqa: E731
        yield Runs(directory, code, lines, checkpoints, resume("whole"), iterations, resume)


def check_same(resumed: Path, whole: Path) -> None:
    assert written(resumed) == written(whole)
    assert (resumed / "completions.jsonl").read_bytes() == (whole / "completions.jsonl").read_bytes()
    assert saved(resumed) == saved(whole)


def test_the_run_trains(runs):
    """Rewards differ and the policy moves; otherwise the equality of runs would say little."""
    lines = written(runs.whole)
    assert [line["step"] for line in lines] == list(range(1, runs.iterations + 1))
    for key in ("loss", "reward/mean", "policy/entropy", "policy/kl"):
        assert len({line[key] for line in lines}) > runs.iterations // 2, key
    assert [line["step"] for line in lines if "eval/cells" in line] == [runs.iterations]


def test_killed_between_iterations(runs):
    assert runs.code == -signal.SIGKILL
    assert runs.checkpoints and len(runs.lines) >= 3
    check_same(runs.train("killed"), runs.whole)


@pytest.mark.slow
def test_sigterm_saves_the_running_iteration(runs, monkeypatch):
    write, handler = walk.MetricWriter.write, signal.getsignal(signal.SIGTERM)

    def write_and_ask(writer, step, metrics):
        write(writer, step, metrics)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(walk.MetricWriter, "write", write_and_ask)
        terminated = runs.train("terminated")
    assert signal.getsignal(signal.SIGTERM) == handler
    assert saved(terminated)[-1] == 3
    assert written(terminated) == written(runs.whole)[:3]
    check_same(runs.train("terminated"), runs.whole)


@pytest.mark.slow
def test_sigterm_to_the_command_exits_with_zero(runs):
    workdir = runs.directory / "asked"
    assert stopped(runs.directory, workdir, signal.SIGTERM) == 0
    lines = written(workdir)
    assert saved(workdir)[-1] == lines[-1]["step"] == len(lines)
    shared = min(len(lines), runs.iterations - 1)
    assert lines[:shared] == written(runs.whole)[:shared]
