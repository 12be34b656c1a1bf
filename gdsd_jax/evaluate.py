"""Evaluates a run, a checkpoint or an adapter: the task's metrics with standard errors, by completion length.

    python -m gdsd_jax.evaluate --config configs/RECIPE.py --workdir runs/gsm8k [--best]
    python -m gdsd_jax.evaluate --config ... --checkpoint DIR [--adapter DIR] --output DIR --tasks gsm8k,sudoku=FILE
    python -m gdsd_jax.evaluate --config ... --workdir runs/b --compare runs/a/evaluation
    python -m gdsd_jax.evaluate --config ... --workdir runs/gsm8k --compare-decoding

Without further flags, the newest checkpoint of the run in `--workdir` completes the test rows of the config's task
under the papers' protocol: the task's evaluation prompt, lengths 128, 256 and 512, one step for every two tokens,
temperature 0, and 256 rows of a planning task or all rows of any other. `config.evaluation` and the flags below change
the protocol. `--tasks` names other tasks, each with a local file of rows if one is given; `config.task` (file,
settings) applies to its own task alone.

Writes `evaluation.json`, `evaluation.md`, `evaluation.png` and `evaluation.jsonl` (the completions) to `--output`, by
default `WORKDIR/evaluation`, and replaces the files of an earlier evaluation. Completions are saved as they are made: a
killed evaluation that is started again with the same settings continues and ends with the same files; with other
settings it is refused. With `--samples` above 1 and a temperature, `--pass_at 1,4` estimates how often at least one of
that many samples is right. With `--compare DIR` nothing is sampled: the evaluation in the output directory is compared
with the one in DIR, item by item.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich.console

from gdsd_jax.config import TrainConfig
from gdsd_jax.config.flags import Option, launch
from gdsd_jax.evaluation import reports
from gdsd_jax.evaluation.policy import POLICY_OPTIONS
from gdsd_jax.evaluation.run import output_directory, run, run_decodings
from gdsd_jax.runtime.errors import UserError


def numbers(text: str | None, flag: str) -> tuple[int, ...]:
    """Returns the numbers in a text such as `"128,256"`.

    Raises:
      UserError: a part of the text is not a positive whole number.
    """
    parts = text.split(",") if text else []
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise UserError(f"{flag} {text!r} is not a list of positive numbers like 128,256")
    return tuple(map(int, parts))


def main(
    config: TrainConfig,
    workdir: Path | None,
    *,
    tasks: str | None,
    lengths: str | None,
    pass_at: str | None,
    compare: str | None,
    compare_decoding: bool,
    output: str | None,
    samples: int,
    temperature: float,
    **flags: Any,
) -> None:
    directory = output_directory(workdir, None if output is None else Path(output))
    console = rich.console.Console()
    named = [part.partition("=") for part in tasks.split(",")] if tasks else []
    flags |= {"tasks": [(name, file or None) for name, _, file in named], "lengths": numbers(lengths, "--lengths")}
    if compare is not None:
        console.print(reports.compare(directory, Path(compare)), highlight=False, markup=False)
    elif compare_decoding:
        if samples > 1 or temperature > 0 or pass_at:
            raise UserError("--compare-decoding is greedy: leave --samples, --temperature and --pass_at out")
        console.print(run_decodings(config, workdir, directory, **flags), highlight=False, markup=False)
    else:
        passes = numbers(pass_at, "--pass_at")
        summary = run(
            config, workdir, output=directory, samples=samples, temperature=temperature, pass_at=passes, **flags
        )
        console.print(reports.table(summary))
    console.print(f"wrote {directory}", highlight=False)


OPTIONS = POLICY_OPTIONS | {
    "tasks": Option(str, None, "NAME or NAME=FILE of each task, with commas between, not the config's."),
    "lengths": Option(str, None, "Completion lengths, such as 128,256."),
    "steps": Option(int, None, "Denoising steps of each completion."),
    "split": Option(str, "test", "Rows to evaluate on: train, validation or test."),
    "count": Option(int, None, "How many of them."),
    "samples": Option(int, 1, "Completions of each row."),
    "temperature": Option(float, 0.0, "Of the sampler; 0 takes the most probable token."),
    "pass_at": Option(str, None, "Numbers k for pass@k, such as 1,4."),
    "compare": Option(str, None, "Directory of an evaluation to hold the one in --output against."),
    "compare_decoding": Option(bool, False, "Several ways of decoding the rows, side by side."),
    "output": Option(str, None, "Directory for the results.", written=True),
}

if __name__ == "__main__":
    launch(main, OPTIONS, needs_workdir=False)
