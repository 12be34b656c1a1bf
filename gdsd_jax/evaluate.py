"""Evaluation of a run, a checkpoint or an adapter at temperature 0, with the task's metrics and their standard errors.

    python -m gdsd_jax.evaluate --config configs/tiny_sudoku.py --workdir runs/demo
    python -m gdsd_jax.evaluate --config ... --checkpoint DIR [--adapter DIR] --output DIR --lengths 128,256,512

Without further flags the newest checkpoint of the run in `--workdir` completes the test split with the config's
sampler. A length that `--lengths` names takes steps in proportion, unless `--steps` fixes them. A file that
`config.task.eval_path` names replaces the split. Writes `evaluation.json`, `evaluation.md` and `evaluation.jsonl` (the
completions) to `--output`, by default `WORKDIR/evaluation`, over those of an earlier evaluation.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import rich.box
import rich.console
import rich.table

from gdsd_jax import commands
from gdsd_jax.config import TrainConfig, greedy_sampler
from gdsd_jax.errors import UserError
from gdsd_jax.training.evaluation import evaluate_policy
from gdsd_jax.training.rollout import encode_prompts

NAMES = ("evaluation.json", "evaluation.md", "evaluation.jsonl")


def run(
    config: TrainConfig,
    workdir: Path | None = None,
    *,
    checkpoint: str | None = None,
    adapter: str | None = None,
    lengths: Sequence[int] = (),
    steps: int | None = None,
    split: str = "test",
    count: int | None = None,
    evaluation_prompt: bool = False,
    output: Path | None = None,
) -> dict[str, Any]:
    """Evaluates one policy at each length, writes the three files and returns what `evaluation.json` holds.

    Its `results` have one entry per length: `completion_length`, `steps`, `block_length`, `seconds` and `metrics`,
    `{metric: {"mean": ..., "error": ...}}`, the standard error of the mean over items.

    Args:
      workdir, checkpoint, adapter: see `commands.load_policy`.
      lengths: completion lengths; none: the config's.
      count: rows of the split (or file); None: all.
      evaluation_prompt: see `commands.load`.
      output: directory of the files; None: `workdir / "evaluation"`.

    Raises:
      UserError: whatever of this cannot be loaded, or does not fit together.
    """
    if output is None and workdir is None:
        raise UserError("nowhere to write: give --output DIRECTORY, or the --workdir of a run")
    output = output or workdir / "evaluation"
    samplers = [greedy_sampler(config, length, steps) for length in lengths or (None,)]
    policy = commands.load_policy(
        config, workdir, checkpoint=checkpoint, adapter=adapter, evaluation_prompt=evaluation_prompt
    )
    rows = policy.task.rows(split, path=config.task.eval_path, count=count)
    prompts = encode_prompts(
        policy.task, policy.tokenizer, rows, buckets=config.prompt_buckets, overlong=config.overlong_prompts
    )
    results, records = [], []
    for sampler in samplers:
        start = time.perf_counter()
        found = evaluate_policy(
            policy.model, policy.base, policy.lora, prompts, sampler, policy.task, policy.tokenizer,
            batch_rows=min(config.evaluation.batch_rows, len(rows)), key=jax.random.key(config.seed),
        )  # fmt: skip
        shape = {name: getattr(sampler, name) for name in ("completion_length", "steps", "block_length")}
        metrics = {name: {"mean": mean, "error": found.errors[name]} for name, mean in found.means.items()}
        results.append({**shape, "seconds": round(time.perf_counter() - start, 3), "metrics": metrics})
        records += [{"completion_length": sampler.completion_length, **record} for record in found.records]
    summary = {
        "checkpoint": str(policy.source),
        "adapter": adapter,
        "workdir": str(workdir) if policy.iteration is not None else None,
        "iteration": policy.iteration,
        "task": policy.task.name,
        "rows": config.task.eval_path or split,
        "count": len(rows),
        "evaluation_prompt": evaluation_prompt,
        "strategy": config.sampler.strategy,
        "results": results,
    }
    texts = (json.dumps(summary, indent=1) + "\n", _markdown(summary), "".join(json.dumps(r) + "\n" for r in records))
    output.mkdir(parents=True, exist_ok=True)
    for name, text in zip(NAMES, texts, strict=True):
        draft = output / f".{name}"
        draft.write_text(text, encoding="utf-8")
        draft.replace(output / name)
    return summary


def describe(summary: dict[str, Any]) -> str:
    """One line: which model on which rows."""
    model = summary["adapter"] or summary["checkpoint"]
    if summary["workdir"]:
        model = f"{summary['workdir']}, iteration {summary['iteration']}"
    return f"{summary['task']}, {summary['count']} rows of {summary['rows']}, {summary['strategy']}, {model}"


def table(summary: dict[str, Any]) -> rich.table.Table:
    """One row per completion length, each metric as mean ± standard error."""
    result = rich.table.Table(title=describe(summary), box=rich.box.SIMPLE_HEAD, title_justify="left")
    for name in _header(summary):
        result.add_column(name, justify="right")
    for cells in _cells(summary):
        result.add_row(*cells)
    return result


def _header(summary: dict[str, Any]) -> list[str]:
    return ["length", "steps", *summary["results"][0]["metrics"], "seconds"]


def _cells(summary: dict[str, Any]) -> list[list[str]]:
    return [
        [
            str(result["completion_length"]),
            str(result["steps"]),
            *(f"{value['mean']:.3f} ± {value['error']:.3f}" for value in result["metrics"].values()),
            f"{result['seconds']:.1f}",
        ]
        for result in summary["results"]
    ]


def _markdown(summary: dict[str, Any]) -> str:
    header = _header(summary)
    lines = [header, ["---:"] * len(header), *_cells(summary)]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{describe(summary)}\n\n{body}\n\nMean ± standard error of the mean over rows.\n"


def parse_lengths(text: str | None) -> tuple[int, ...]:
    """`"128,256"` as numbers.

    Raises:
      UserError: something in it is no positive whole number.
    """
    parts = text.split(",") if text else []
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise UserError(f"--lengths {text!r} is not a list of completion lengths like 128,256")
    return tuple(map(int, parts))


def main(config: TrainConfig, workdir: Path | None, *, lengths: str | None, output: str | None, **flags: Any) -> None:
    chosen = None if output is None else Path(output)
    summary = run(config, workdir, lengths=parse_lengths(lengths), output=chosen, **flags)
    console = rich.console.Console()
    console.print(table(summary))
    console.print(f"wrote {chosen or workdir / 'evaluation'}", highlight=False)


OPTIONS = commands.POLICY_OPTIONS | {
    "lengths": commands.Option(str, None, "Completion lengths, such as 128,256."),
    "steps": commands.Option(int, None, "Denoising steps of each completion."),
    "split": commands.Option(str, "test", "Rows to evaluate on: train, validation or test."),
    "count": commands.Option(int, None, "How many of them, instead of all."),
    "evaluation_prompt": commands.Option(bool, False, "Use the task's evaluation prompt, not its training prompt."),
    "output": commands.Option(str, None, "Directory for the results."),
}

if __name__ == "__main__":
    commands.launch(main, OPTIONS, needs_workdir=False)
