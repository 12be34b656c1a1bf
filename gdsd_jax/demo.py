"""Runs every stage on the embedded model: random weights, SFT, GDSD on adapters, evaluation, exports, reload.

    python -m gdsd_jax.demo --config configs/tiny_sudoku.py --workdir runs/demo

It prints the accuracy on the 256 test puzzles before and after GDSD, and writes `metrics.jsonl`, `curves.png`,
`samples.md`, `export/merged`, `export/adapter` and `summary.json` to the workdir. The same command resumes a demo that
was interrupted.
"""

from __future__ import annotations

import dataclasses
import resource
import shutil
import time
from pathlib import Path

from gdsd_jax import evaluate, export, train
from gdsd_jax.config import TrainConfig
from gdsd_jax.config.flags import launch
from gdsd_jax.evaluation import reports
from gdsd_jax.runtime.console import Console
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.files import read_objects, write_json, write_text
from gdsd_jax.runtime.signals import exit_code
from gdsd_jax.sft import embedded_start
from gdsd_jax.tasks import TASKS

SAMPLES = 16


def demo(config: TrainConfig, workdir: Path) -> dict:
    """Runs all stages and returns the content of `summary.json`.

    Raises:
      UserError: the config does not train adapters of an embedded model on Sudoku.
    """
    if not (config.tiny.family and config.lora.rank and config.task.name == "sudoku"):
        raise UserError(
            "the demo trains adapters of an embedded model on Sudoku: set config.tiny.family, config.lora.rank above 0 "
            "and config.task.name to sudoku, as configs/tiny_sudoku.py does"
        )
    start = time.perf_counter()
    console = Console()
    config = dataclasses.replace(config, checkpoint=str(workdir / "start" / "merged"))
    exports = workdir / "export"
    if not Path(config.checkpoint).exists():
        console.rule("1  supervised start")
    embedded_start(config)
    before = accuracy(config, workdir / "before", checkpoint=config.checkpoint)
    console.print(f"before: {percent(before)}")

    if not all((exports / name).is_dir() for name in ("merged", "adapter")):
        console.rule(f"2  {config.method} on adapters")
        state = train.train(config, workdir)
        if int(state.iteration) < config.iterations:
            console.print("stopped: the same command resumes here")
            raise SystemExit(exit_code())
        shutil.rmtree(exports, ignore_errors=True)
        export.run(config, workdir, exports)
    console.rule("3  evaluation and reload")
    after = accuracy(config, workdir / "after", workdir=workdir)
    merged = accuracy(config, workdir / "reloaded_merged", checkpoint=str(exports / "merged"))
    adapter = accuracy(
        config, workdir / "reloaded_adapter", checkpoint=config.checkpoint, adapter=str(exports / "adapter")
    )
    console.print(f"after:  {percent(after)}")
    console.print(f"merged export, reloaded:  {percent(merged)}")
    console.print(f"base + adapter, reloaded: {percent(adapter)}")
    write_samples(workdir)
    summary = {
        "before": before,
        "after": after,
        "reloaded": {**merged, "merged": merged, "adapter": adapter},
        "seconds": time.perf_counter() - start,
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }
    write_json(workdir / "summary.json", summary)
    console.print(
        f"{summary['seconds']:.0f} s, {summary['peak_rss_gb']:.2f} GB; everything is in {workdir}", markup=False
    )
    return summary


def accuracy(config: TrainConfig, output: Path, **policy: str | Path) -> dict[str, float]:
    """Evaluates a policy, and returns the means of the task's metrics on the test split under greedy decoding.

    Args:
      output: directory for the files of the evaluation.
      policy: arguments of `gdsd_jax.evaluation.policy.load_policy`.
    """
    metrics = evaluate.run(config, output=output, **policy)["results"][0]["metrics"]
    return {name: metrics[name]["mean"] for name in TASKS[config.task.name].metrics_named}


def percent(metrics: dict[str, float]) -> str:
    """Formats metrics in percent on one line."""
    return ", ".join(f"{name} {value:.1%}" for name, value in metrics.items())


def write_samples(workdir: Path) -> None:
    """Writes the first test puzzles, with their completions before and after GDSD, as a Markdown table."""
    read = lambda name: read_objects(workdir / name / reports.COMPLETIONS)  # noqa: E731
    lines = ["| puzzle | solution | before | after |", "|---|---|---|---|"]
    for before, after in list(zip(read("before"), read("after"), strict=True))[:SAMPLES]:
        cells = (before["puzzle"], before["solution"], before["completion"], after["completion"])
        lines.append("| " + " | ".join(f"`{cell}`" for cell in cells) + " |")
    write_text(workdir / "samples.md", "\n".join(lines) + "\n")


def main(config: TrainConfig, workdir: Path) -> None:
    demo(config, workdir)


if __name__ == "__main__":
    launch(main)
