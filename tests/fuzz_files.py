"""Fuzzes files and settings: every damaged one is either read or refused in one line; none raises or hangs.

    python tests/fuzz_files.py --count 5000 [--targets config,header] [--seed 0]

Files of a checkpoint, an adapter, a run and an evaluation, data files and saved states are damaged as JSON (values of
other types, absent and huge ones, NaN) or as bytes (cut, flipped, emptied, grown); settings and the flags of commands
get values of any type. The script prints a line per
target with its counts and the longest case. It exits with code 1 if a case raised anything but UserError, let NaN
through, or took longer than 10 s.
"""

import argparse
import collections
import dataclasses
import functools
import importlib.util
import json
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fuzz_checkpoints
import fuzz_data
import fuzz_flags
import jax
import numpy as np
from damage import ODD, changed, damaged
from safetensors.numpy import load_file, save_file

from gdsd_jax import hub
from gdsd_jax.config import TrainConfig, default, freeze, to_dict
from gdsd_jax.denoiser import init_lora
from gdsd_jax.evaluation import reports
from gdsd_jax.evaluation.comparison import read_result
from gdsd_jax.evaluation.run import resumed
from gdsd_jax.hub import tiny
from gdsd_jax.methods import METHODS, build
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.tasks import TASKS, resolve
from gdsd_jax.telemetry.metrics import read_metrics
from gdsd_jax.telemetry.planned import planned_sizes, read_plan
from gdsd_jax.training.fit import fitted_to_devices
from gdsd_jax.training.record import read_record, with_first_schedule

SECONDS, BYTES = 10.0, 3 << 30


def damaged_header(draw: random.Random, raw: bytes) -> bytes:
    """Returns a safetensors file with a damaged header of consistent length, or with other damage."""
    if draw.random() < 0.3:
        return damaged(draw, raw)
    if draw.random() < 0.3:
        data = bytearray(raw)
        data[-draw.randint(1, 400) :] = b"\xff" * draw.randint(1, 400)
        return bytes(data)
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.dumps(changed(draw, json.loads(raw[8 : 8 + length]))).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(header)) + header + raw[8 + length :]


def finite(tree: Any) -> None:
    """Raises AssertionError if a number of a pytree is not finite."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, (float, np.ndarray, jax.Array)):
            assert np.isfinite(np.asarray(leaf, np.float64)).all(), "NaN was let through"


class World:
    """Makes a directory with a file of every kind, once; `run` damages one file at a time and restores it."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.base, self.adapter, self.run = directory / "base", directory / "adapter", directory / "run"
        tiny.build(self.base, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16, max_length=64)
        (self.base / "generation_config.json").write_text('{"eos_token_id": 2, "pad_token_id": 0}')
        self.model = hub.read_config(self.base)
        self._sharded(directory / "sharded")
        lora = init_lora(self.model, jax.random.key(0), rank=2, alpha=4.0, targets=("q", "down"))
        hub.export_adapter(self.adapter, self.model, lora, source=self.base)
        self.run.mkdir()
        self.config = freeze(TrainConfig, default(str(self.base)))
        record = {"config": to_dict(self.config), "base": hub.fingerprint(self.base)}
        self.write("run.json", json.dumps(record))
        self.write("metrics.jsonl", "".join(json.dumps({"step": n, "loss": n / 7}) + "\n" for n in range(1, 5)))
        planned = {"peak_bytes": 10, "seconds_roofline": 0.5}
        sizes = {"method": "gdsd", "lora_rank": self.config.lora.rank, "rows": 320, "microbatch_rows": 16}
        self.write("plan.json", json.dumps(sizes | {"sampler": planned, "update": planned}))
        self.identity = {"parameters": [1, 2], "seed": 3}
        batch = {"part": "sudoku 8", "texts": ["a", "b"], "kl": [0.1, 0.2]}
        self.write("unfinished.jsonl", "".join(json.dumps(x) + "\n" for x in (self.identity, batch, batch)))
        metric = {"cells": {"mean": 0.5, "error": 0.1}}
        entry = {"task": "sudoku", "rows": "test", "count": 2, "items": "00", "completion_length": 8, "steps": 4}
        summary = {"checkpoint": "a", "adapter": None, "workdir": None, "iteration": None, "strategy": "random"}
        summary |= {"temperature": 0.0, "samples": 1, "results": [entry | {"block_length": 4, "metrics": metric}]}
        self.write(reports.SUMMARY, json.dumps(summary))
        row = {"task": "sudoku", "completion_length": 8, "item": 0, "cells": 0.5}
        self.write(reports.COMPLETIONS, (json.dumps(row) + "\n") * 2)
        self.other = directory / "other"
        shutil.copytree(self.run, self.other)
        self.rows = directory / "rows.jsonl"
        puzzle = {"puzzle": "1000040000300001", "solution": "1243341221344321"}
        self.rows.write_text((json.dumps(puzzle) + "\n") * 3)

    def _sharded(self, directory: Path) -> None:
        """Copies the base, with its tensors in two files and an index."""
        shutil.copytree(self.base, directory)
        tensors = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        places = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
        for file in set(places.values()):
            save_file({name: tensors[name] for name in tensors if places[name] == file}, directory / file)
        index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": places}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    def write(self, name: str, text: str) -> None:
        (self.run / name).write_text(text)


def load(world: World) -> None:
    finite(hub.load_checkpoint(world.base)[1])


def tokenizer(world: World) -> None:
    found = hub.load_tokenizer(world.base)
    found.prompts([found.render([{"role": "user", "content": "a<|mask|>b"}])], buckets=(32,), overlong="keep_last")


def adapter(world: World) -> None:
    lora = hub.load_adapter(world.adapter, world.model)
    finite((lora.weights, lora.alpha, lora.dropout))
    hub.another_base(world.adapter, world.base)


def record(world: World) -> None:
    read_record(world.run)
    with_first_schedule(world.config, world.run)


def plan(world: World) -> None:
    read_plan(world.run, world.config)
    open_sizes = dataclasses.replace(world.config, microbatch_rows=None)
    fitted_to_devices(open_sizes, build("gdsd"), planned_sizes(world.run))


TARGETS: dict[str, tuple[str, Callable[[World], Any], Callable]] = {
    "config": ("base/config.json", load, damaged),
    "index": (
        "sharded/model.safetensors.index.json",
        lambda world: finite(hub.load_checkpoint(world.directory / "sharded")[1]),
        damaged,
    ),
    "header": ("base/model.safetensors", load, damaged_header),
    "tokenizer": ("base/tokenizer.json", tokenizer, damaged),
    "tokenizer_config": ("base/tokenizer_config.json", tokenizer, damaged),
    "generation": ("base/generation_config.json", tokenizer, damaged),
    "template": ("base/chat_template.jinja", tokenizer, damaged),
    "adapter_config": ("adapter/adapter_config.json", adapter, damaged),
    "adapter_weights": ("adapter/adapter_model.safetensors", adapter, damaged_header),
    "run": ("run/run.json", record, damaged),
    "metrics": ("run/metrics.jsonl", lambda world: read_metrics(world.run), damaged),
    "plan": ("run/plan.json", plan, damaged),
    "result": (
        f"run/{reports.SUMMARY}",
        lambda world: read_result(world.config, world.run, base="0" * 16, iteration=None),
        damaged,
    ),
    "part": (
        "run/unfinished.jsonl",
        lambda world: resumed(world.run / "unfinished.jsonl", world.identity),
        damaged,
    ),
    "evaluation": (
        f"run/{reports.SUMMARY}",
        lambda world: reports.compare_evaluations(world.run, world.other),
        damaged,
    ),
    "completions": (
        f"run/{reports.COMPLETIONS}",
        lambda world: reports.compare_evaluations(world.run, world.other),
        damaged,
    ),
    "rows": ("rows.jsonl", lambda world: TASKS["sudoku"].read(world.rows), damaged),
}


def setting(world: World, draw: random.Random) -> None:
    """Freezes a config with one or two odd values."""
    values = to_dict(world.config)
    for _ in range(draw.randint(1, 2)):
        place = values
        while True:
            name = draw.choice(list(place))
            if not isinstance(place[name], dict) or not place[name] or draw.random() < 0.1:
                break
            place = place[name]
        place[name] = draw.choice(ODD)
    made = to_dict(freeze(TrainConfig, values))
    finite(made | {"settings": {}, "task": {}, "optimizer": {}})


def method(world: World, draw: random.Random) -> None:
    name = draw.choice(list(METHODS))
    fields = list(METHODS[name].settings.__dataclass_fields__)
    build(name, **{draw.choice(fields): draw.choice(ODD)})


def task(world: World, draw: random.Random) -> None:
    names = ("template", "system", "assistant_prefix", "answer_template", "examples", "shots", "weights")
    made = resolve("sudoku", **{draw.choice(names): draw.choice(ODD) for _ in range(2)})
    row = {"puzzle": "1000040000300001", "solution": "1243341221344321"}
    made.messages(row), made.answer(row), finite(dict(made.weights))


# Cases without a single file that is damaged: each function makes one and reads it.
CASES: dict[str, Callable[[World, random.Random], None]] = {
    "settings": setting,
    "methods": method,
    "tasks": task,
    "data": fuzz_data.case,
    "flags": fuzz_flags.case,
    "checkpoints": fuzz_checkpoints.case,
}
if importlib.util.find_spec("lm_eval"):
    CASES["lm_eval"] = fuzz_flags.lm_eval


def run(world: World, root: Path, target: str, count: int, seed: int) -> dict[str, Any]:
    """Runs `count` cases of one target, and returns the counts of their outcomes and the failures."""
    draw = random.Random(f"{target} {seed}")
    outcomes: collections.Counter = collections.Counter()
    slowest, failures = 0.0, []
    odd = CASES.get(target)
    if odd is None:
        file, read, damage = TARGETS[target]
        path = root / file
        raw = path.read_bytes()
        case = functools.partial(read, world)
        case()  # what is whole is read
    for number in range(count):
        if odd is None:
            path.write_bytes(damage(draw, raw))
        else:
            case = functools.partial(odd, world, draw)
        start = time.perf_counter()
        try:
            case()
            outcomes["read"] += 1
        except UserError as error:
            outcomes["refused"] += 1
            if not str(error).strip():
                failures.append(f"case {number}: an empty message")
        except BaseException as error:
            outcomes["raised"] += 1
            failures.append(f"case {number}: {type(error).__name__}: {str(error)[:200]}")
        seconds = time.perf_counter() - start
        slowest = max(slowest, seconds)
        if seconds > SECONDS:
            failures.append(f"case {number}: {seconds:.1f} s")
    if odd is None:
        path.write_bytes(raw)
    return {"target": target, **outcomes, "slowest": round(slowest, 2), "failures": failures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="cases of each target")
    parser.add_argument("--targets", default=",".join([*TARGETS, *CASES]))
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        for target in flags.targets.split(","):
            found = run(world, Path(folder), target, flags.count, flags.seed)
            failures = found.pop("failures")
            failed |= bool(failures)
            print(json.dumps(found | {"failures": len(failures)}), *failures[:5], sep="\n  ", flush=True)
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{megabytes:.0f} MB")
    sys.exit(failed or megabytes * 2**20 > BYTES)


if __name__ == "__main__":
    main()
