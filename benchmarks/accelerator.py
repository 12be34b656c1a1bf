"""Measures the 8B shape on this machine's accelerator: sampler steps, an update, disk, and two iterations of a run.

    python -m benchmarks.accelerator --workdir DIR [--parts product,full,dual,update,torch,disk,train] [--json FILE]

The model has random weights of LLaDA-8B's shape in bfloat16, and LoRA of rank 128 on all seven matrices. Prompts have
400 tokens, a part of which are pads; completions have 256, in blocks of 32. Times are medians over turns, each of which
waits for its results; compilation is reported apart. Utilisation is relative to the device's large matrix product,
measured in the same run, and does not count recomputed FLOPs.

    product   a square matrix product, and a copy
    full      a full sampler step, 32 rows: all tokens through the layers, the head on the block, a token drawn
    dual      a cached step, with keys and values outside the block kept: the difference of many steps and few
    update    an inner update, 8 rows: one coupled pair of views, with the KL to the base
    torch     the lean step and the update in PyTorch (`benchmarks.torch_steps`), if it is installed
    disk      the export of the checkpoint (16 GB), and its loading
    train     `gdsd_jax.train` on that checkpoint for two iterations, then `gdsd_jax.export`; needs `disk`

The parts of this module share one process, PyTorch and `train` have their own, so that each has the device's memory to
itself. A failed part is reported, and the next one begins. `--tiny` runs all of it in small, also on a CPU. All parts
together take under ten minutes on an H100.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.arguments import one_of, parser_of, several

ROOT = Path(__file__).parents[1]
PARTS = ("product", "full", "dual", "update", "torch", "disk", "train")
# The parts that share a process, and therefore the weights.
TOGETHER = ("product", "full", "dual", "update", "disk")
TINY_RUN = (
    "--config.lora.rank=4", "--config.sampler.completion_length=16", "--config.sampler.steps=4",
    "--config.sampler.block_length=8", "--config.prompt_buckets=(16,)", "--config.prompts_per_iteration=1",
    "--config.group_size=2", "--config.microbatch_rows=2", "--config.inner_updates=1",
    "--config.evaluation.batch_rows=2", "--config.evaluation.count=2",
)  # fmt: skip


def train(workdir: Path, tiny: bool) -> dict[str, Any]:
    """Trains the public demo on the checkpoint of `disk` for two iterations, exports it, and returns the times."""
    run, output = workdir / "run", workdir / "export"
    for path in (run, output):
        shutil.rmtree(path, ignore_errors=True)
    common = [
        "--config", "configs/llada_8b_sudoku.py", f"--config.checkpoint={workdir / 'checkpoint'}", "--workdir", str(run)
    ]  # fmt: skip
    # The evaluation at the end is not measured, so it is short.
    shortly = ("--config.evaluation.count=4", "--config.evaluation.steps=8")
    options = ["--config.iterations=2", *shortly, *(TINY_RUN if tiny else ())]
    start = time.perf_counter()
    command("gdsd_jax.train", *common, *options)
    trained = time.perf_counter()
    command("gdsd_jax.export", *common, *options, "--output", str(output))
    exported = time.perf_counter() - trained
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = ("time/rollout", "time/reward", "time/update", "time/iteration", "policy/clipped")
    seconds = {f"iteration {n}": {k: row[k] for k in names if k in row} for n, row in enumerate(lines, 1)}
    return {"train_seconds": trained - start, "export_seconds": exported} | seconds


def command(module: str, *arguments: str) -> None:
    """Runs `python -m MODULE ARGUMENTS` in the checkout; raises CalledProcessError if it fails."""
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, check=True)


# ------------------------------------------------------------------------------------------------------------- report


def together(wanted: list[str], tiny: bool, attention: str, workdir: Path) -> Iterator[dict[str, Any]]:
    """Measures the wanted parts that share a process, and yields a row of results for each."""
    from benchmarks import accelerator_parts as parts

    sizes = parts.TINY if tiny else parts.REAL
    shapes = parts.make(sizes, attention) if set(wanted) - {"product"} else None
    work: dict[str, Callable[[], dict[str, Any]]] = {"product": lambda: parts.product(sizes)}
    if shapes:
        work |= dict(parts.steps(sizes, shapes))
        work |= {"update": lambda: parts.update(sizes, shapes), "disk": lambda: parts.disk(shapes, workdir)}
    for name in TOGETHER:
        if name in wanted:
            try:
                yield {"part": name} | work[name]()
            except Exception as error:
                yield {"part": name, "error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"}


def line(row: dict[str, Any], peak: float | None) -> str:
    """Formats a row of results as a line of text; `peak` is the device's FLOP/s."""
    if "error" in row:
        return f"{row['part']}: {row['error']}"
    words = [f"{row.get('rows', '')} rows".strip()] if "rows" in row else []
    for key, value in row.items():
        if key.endswith("seconds"):
            words.append(f"{key.removesuffix('_seconds').replace('seconds', 'median')} {value:.4f} s")
        elif key.startswith("iteration"):
            words.append(f"{key}: " + ", ".join(f"{k.split('/')[1]} {v:.2f}" for k, v in value.items()))
    if "flops" in row:
        words.append(f"{row['flops'] / 1e12:.0f} TFLOP/s, copy {row['copy_bytes'] / 1e9:.0f} GB/s, {row['device']}")
    if peak and "flops_needed" in row:
        share = row["flops_needed"] / row["seconds"] / peak
        words.append(f"{row['flops_needed'] / 1e12:.1f} TFLOP, {100 * share:.1f} %")
    if peak and "flops_done" in row:
        words.append(f"with recomputation {100 * row['flops_done'] / row['seconds'] / peak:.1f} %")
    words += [f"{row[key]:.1f} GB {name}" for key, name in (("gb", "written"), ("peak_gb", "peak")) if key in row]
    return f"{row['part']}: " + ", ".join(words)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measures the parts that the command line names, prints a line for each, and returns the rows of results."""
    parser = parser_of(__doc__)
    parts = several(one_of(PARTS))
    parser.add_argument("--parts", type=parts, default=",".join(PARTS), help="parts to measure, with commas between")
    parser.add_argument("--workdir", type=Path, required=True, help="directory for 32 GB, emptied first")
    parser.add_argument("--attention", default="auto", help="value of config.model.attention")
    parser.add_argument("--json", type=Path, help="keeps the rows")
    parser.add_argument("--tiny", action="store_true", help="runs all of it in small, also on a CPU")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    wanted = flags.parts
    if flags.inside:
        for row in together(wanted, flags.tiny, flags.attention, flags.workdir):
            print(json.dumps(row), flush=True)
        return []
    rows: list[dict[str, Any]] = []

    def report(row: dict[str, Any]) -> None:
        rows.append(row)
        peak = next((r["flops"] for r in rows if "flops" in r), None)
        print(line(row, peak), flush=True)
        if flags.json:
            flags.json.write_text(json.dumps(rows, indent=1) + "\n")

    def follow(part: str, module: str, *arguments: str) -> None:
        """Runs a module in a process of its own, and reports each row as it prints it."""
        child = subprocess.Popen(
            [sys.executable, "-m", module, *arguments, *["--tiny"] * flags.tiny],
            cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"},
        )  # fmt: skip
        for text in child.stdout:
            if text.startswith("{"):
                report(json.loads(text))
        if child.wait():
            report({"part": part, "error": f"the process ended with exit code {child.returncode}"})

    shared = [part for part in TOGETHER if part in wanted]
    if shared:
        own = [f"--parts={','.join(shared)}", f"--workdir={flags.workdir}", f"--attention={flags.attention}"]
        follow(",".join(shared), "benchmarks.accelerator", *own, "--inside")
    if "torch" in wanted:
        if all(importlib.util.find_spec(name) for name in ("torch", "peft")):
            follow("torch", "benchmarks.torch_steps")
        else:
            print("torch: PyTorch or PEFT is not installed here", flush=True)
    if "train" in wanted:
        try:
            report({"part": "train"} | train(flags.workdir, flags.tiny))
        except subprocess.CalledProcessError as error:
            report({"part": "train", "error": str(error)})
    return rows


if __name__ == "__main__":
    main()
