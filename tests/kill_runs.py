"""Stops commands at random moments and starts them again: they must end with the files of an undisturbed run.

    python tests/kill_runs.py [--kills 60] [--terms 20] [--seed 0] [--commands train,sft,export,evaluate,compare]

`--kills` is the number of SIGKILLs and `--terms` the number of pairs of SIGTERMs; both are divided among the commands.
The moment of a signal is drawn by one of two clocks: seconds since the command began, or files and lines that it has
written. A stopped command is started again in the same directory, where the next signal may hit it, until it ends by
itself. Then its files are compared with those of an undisturbed run, and no temporary file may be left. The script
prints a line per command, and exits with code 1 if a result differs. Commands run as forks of this process, which has
imported everything but started no backend; that saves most of their start.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

CONFIG = """
from pathlib import Path
from gdsd_jax import config as settings


def get_config(length=8):
    length = int(length)
    config = settings.default(checkpoint=str(Path(__file__).parent / "base"))
    with config.unlocked():
        config.task.update(name="even:TASK", train_rows=8)
        config.task.settings = {"template": "{puzzle}"}
        config.prompt_buckets = (18,)
        config.model.update(dtype="float32", remat="none", vocab_chunk=128)
        config.lora.update(rank=2, alpha=4.0, dropout=0.0, targets=("q", "down"))
        config.optimizer.learning_rate = 0.05
        config.sampler.update(completion_length=length, steps=4, block_length=length)
        config.evaluation.update(count=8, split="test", batch_rows=4, evaluation_prompt=False, lengths=(length,))
        config.evaluation.update(every=3, best="cells")
        config.update(iterations=6, prompts_per_iteration=2, group_size=2, inner_updates=1, microbatch_rows=2)
        config.update(save_every=2, completions_logged=2)
        config.sft.update(steps=12, batch_rows=4, save_every=3)
        config.tiny.update(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=48)
    return config
"""
TASK = """
import dataclasses
from gdsd_jax.tasks import TASKS


def score(completion, row):
    return {"even": sum(ord(c) % 2 == 0 for c in completion) / 8}


TASK = dataclasses.replace(TASKS["sudoku"], name="even", score=score, weights={"even": 1.0})
"""
PATIENCE = 300.0
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

IMPORTED = (
    "gdsd_jax.train", "gdsd_jax.sft", "gdsd_jax.export", "gdsd_jax.evaluate", "gdsd_jax.compare", "matplotlib.figure",
    "gdsd_jax.training.checkpoint",
)  # fmt: skip


class Command(NamedTuple):
    """A command, its shares of both kinds of signals, and the path that it writes last; None if it may be repeated."""

    arguments: tuple[str, ...]
    kills: float
    terms: float
    last: str | None


# The paths are relative to a directory that each chain of starts has for itself.
COMMANDS = {
    "train": Command(("--config=../config.py", "--workdir=run"), 0.3, 0.35, "run/checkpoints/6"),
    "sft": Command(("--config=../config.py:48", "--config.tiny.family=llada", "--workdir=run"), 0.2, 0.2, "run/merged"),
    "export": Command(("--config=../config.py", "--workdir=../trained", "--output=run"), 0.15, 0.1, "run/adapter"),
    "evaluate": Command(
        ("--config=../config.py", "--workdir=../trained", "--config.evaluation.batch_rows=1", "--output=run",
         "--count=24", "--lengths=4,8"),
        0.2, 0.1, "run/evaluation.json",
    ),
    "compare": Command(
        ("--config=../config.py", "--methods=gdsd,wd1", "--seeds=1", "--metric=cells", "--config.iterations=4",
         "--workdir=run"),
        0.15, 0.25, None,
    ),
}  # fmt: skip


def started(name: str, directory: Path) -> int:
    """Runs the command in `directory` in a fork, and returns the fork's process id."""
    directory.mkdir(parents=True, exist_ok=True)
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        os.chdir(directory)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        from gdsd_jax.config.flags import launch

        module = importlib.import_module(f"gdsd_jax.{name}")
        if hasattr(module, "plot_curves"):
            module.plot_curves = lambda workdir: None  # a quarter of a run's time, and drawn anew at each end
        options = getattr(module, "OPTIONS", None)
        needs = name not in ("export", "evaluate")
        launch(module.main, options, needs_workdir=needs, argv=[name, *COMMANDS[name].arguments])
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def ended(process: int) -> int | None:
    """Returns the exit code of a process, negative for a signal, or None while it is running."""
    found, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


class Events:
    """Counts the paths that have appeared in a directory since the start, and the lines in its JSONL files."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._seen = set(self._paths())
        self._first = self._lines()
        self.paths = 0

    def _paths(self) -> list[str]:
        return [os.path.join(top, name) for top, folders, files in os.walk(self._directory) for name in folders + files]

    def _lines(self) -> int:
        return sum(count(Path(path)) for path in self._paths() if path.endswith(".jsonl"))

    def __call__(self) -> int:
        new = set(self._paths()) - self._seen
        self._seen |= new
        self.paths += len(new)
        return self.paths + max(0, self._lines() - self._first)


def count(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0


def undisturbed(name: str, directory: Path) -> tuple[float, int]:
    """Runs a command to its end; returns its seconds and its events."""
    start, process, events, number = time.monotonic(), started(name, directory), Events(directory), 0
    while (code := ended(process)) is None:
        number = events()
        time.sleep(0.002)
    assert code == 0, (directory / "log").read_text()
    return time.monotonic() - start, number


def disturbed(name: str, directory: Path, moment: tuple[str, float], pause: float | None) -> tuple[int, bool]:
    """Runs a command and signals it at a moment.

    Args:
      moment: ("seconds", number since the start) or ("events", number).
      pause: seconds between two SIGTERMs; None sends SIGKILL.

    Returns:
      The exit code, and whether the signal found the process alive.
    """
    clock, when = moment
    start, process, events, hit = time.monotonic(), started(name, directory), Events(directory), False
    first, second = (signal.SIGKILL, None) if pause is None else (signal.SIGTERM, pause)
    while (code := ended(process)) is None:
        passed = time.monotonic() - start
        assert passed < PATIENCE, f"{directory} hangs: {(directory / 'log').read_text()}"
        if first is not None and (events() if clock == "events" else passed) >= when:
            os.kill(process, first)
            hit, first = True, None
            if second is not None:
                time.sleep(second)
                if (code := ended(process)) is not None:
                    break
                os.kill(process, signal.SIGTERM)
        time.sleep(0.002)
    return code, hit


def newest(checkpoint: Path) -> str:
    """Returns the name of the newest checkpoint beside this one."""
    return max((path.name for path in checkpoint.parent.iterdir() if path.name.isdigit()), key=int, default="")


def contents(directory: Path) -> dict[str, Any]:
    """Returns the files that a command has left, by path, without measured times.

    Only the newest checkpoint is included, because a SIGTERM decides which others are kept.
    """
    found: dict[str, Any] = {}
    for path in sorted((directory / "run").rglob("*")):
        name, parts = path.relative_to(directory).as_posix(), path.relative_to(directory).parts
        # The lock of a killed process stays, and reserves nothing.
        if not path.is_file() or path.name == ".lock":
            continue
        saved = [index for index, part in enumerate(parts[:-1]) if part in ("checkpoints", "best")]
        if saved:
            # Orbax notes the time. Its arrays are compared by the checksums that are saved with them, and a resumed
            # run compares those with the arrays.
            key = "/".join(parts[: saved[0] + 2])
            older = parts[saved[0]] == "checkpoints" and parts[saved[0] + 1] != newest(directory / key)
            if older and parts[saved[0] + 1].isdigit():
                continue
            found.setdefault(key, None)
            if parts[saved[0] + 2 :] == ("data", "metadata"):
                found[key] = path.read_bytes()
        elif path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
        elif path.name == "table.json":
            found[name] = timeless(json.loads(path.read_text()))
        elif path.name in ("curves.png", "table.md"):
            found[name] = None
        else:
            found[name] = path.read_bytes()
    return found


def timeless(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: timeless(value) for key, value in content.items() if "seconds" not in key}
    return [timeless(value) for value in content] if isinstance(content, list) else content


def differences(name: str, found: dict[str, Any], whole: dict[str, Any]) -> list[str]:
    return [f"{name}: {path}" for path in sorted(set(found) | set(whole)) if found.get(path, 0) != whole.get(path, 0)]


def finished(name: str, directory: Path) -> bool:
    """Returns whether a signal came after everything was written: a finished export cannot be repeated.

    The checkpoints of supervised training outlive its export for a moment; the next start removes them.
    """
    last = COMMANDS[name].last
    left = any((directory / "run" / part).exists() for part in (".export.part", "sft"))
    return last is not None and (directory / last).exists() and not left


def saved_at_stop(directory: Path) -> bool:
    """Returns whether the newest checkpoint of a training run is of the last iteration in its metrics."""
    steps = [int(path.name) for path in (directory / "run/checkpoints").glob("*") if path.name.isdigit()]
    lines = (directory / "run/metrics.jsonl").read_text().splitlines()
    return max(steps) == json.loads(lines[-1])["step"]


def chains(name: str, root: Path, kills: int, terms: int, draw: random.Random) -> dict[str, Any]:
    """Stops a command as often as asked, in as many chains of starts as that takes, and returns the outcome."""
    undisturbed(name, root / f"{name}-first")
    seconds, events = undisturbed(name, root / f"{name}-whole")
    whole = contents(root / f"{name}-whole")
    failures = differences(f"{name}-first", contents(root / f"{name}-first"), whole)
    left = {"kill": kills, "term": terms}
    starts, chain, codes = 0, 0, {}
    while any(left.values()):
        chain += 1
        directory = root / f"{name}-{chain}"
        while True:
            starts += 1
            clock = draw.choice(("seconds", "events"))
            kinds = [kind for kind in left if left[kind] > 0]
            kind = draw.choice(kinds) if kinds else None
            when = draw.uniform(0, seconds if clock == "seconds" else events) if kind else float("inf")
            pause = draw.choice((0.0, draw.uniform(0, 0.3))) if kind == "term" else None
            code, hit = disturbed(name, directory, (clock, when), pause)
            if hit:
                left[kind] -= 1
            codes[code] = codes.get(code, 0) + 1
            if code not in (0, -signal.SIGKILL, -signal.SIGTERM) or (code and not hit):
                failures.append(f"{directory.name}: ended with {code}: {(directory / 'log').read_text()[-500:]}")
                break
            if code == 0 and hit and name == "train" and not saved_at_stop(directory):
                failures.append(f"{directory.name}: the second SIGTERM lost a checkpoint")
            if finished(name, directory) or (code == 0 and not hit):
                failures += differences(directory.name, contents(directory), whole)
                break
    return {
        "command": name, "kills": kills, "terms": terms, "starts": starts, "chains": chain, "exit codes": codes,
        "seconds of one": round(seconds, 1), "failures": failures,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--terms", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", default=",".join(COMMANDS))
    parser.add_argument("--keep", type=Path, help="a new directory in which everything stays")
    flags = parser.parse_args()
    names = flags.commands.split(",")
    with tempfile.TemporaryDirectory() as temporary:
        root = flags.keep or Path(temporary)
        root.mkdir(exist_ok=True)
        os.environ.update(ENVIRONMENT)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / "cache"))
        (root / "config.py").write_text(CONFIG)
        (root / "even.py").write_text(TASK)
        for module in IMPORTED:
            importlib.import_module(module)
        import transformers

        assert transformers.AutoTokenizer and transformers.PreTrainedTokenizerFast  # imported at their first use
        prepare(root, names)
        failed = False
        for name in names:
            share = sum(COMMANDS[each].kills for each in names), sum(COMMANDS[each].terms for each in names)
            kills, terms = round(flags.kills * COMMANDS[name].kills / share[0]), COMMANDS[name].terms / share[1]
            found = chains(name, root, kills, round(flags.terms * terms), random.Random(f"{name} {flags.seed}"))
            failures = found.pop("failures")
            failed |= bool(failures)
            print(json.dumps(found | {"failures": len(failures)}), *failures[:10], sep="\n  ", flush=True)
    sys.exit(failed)


def prepare(root: Path, names: list[str]) -> None:
    """Makes the checkpoint that training starts from, in a process of its own, and a run for export and evaluation."""
    process = os.fork()
    if not process:
        code = 70
        try:
            from gdsd_jax.hub import tiny

            tiny.build(root / "base", hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, max_length=64)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(process, 0)[1] == 0
    if not {"export", "evaluate"} & set(names):
        return
    undisturbed("train", root / "trained-run")
    (root / "trained-run" / "run").rename(root / "trained")


if __name__ == "__main__":
    main()
