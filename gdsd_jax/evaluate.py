"""Evaluates a run, a checkpoint or an adapter: the task's metrics with standard errors, by completion length.

    python -m gdsd_jax.evaluate --config configs/RECIPE.py --workdir runs/gsm8k [--best]
    python -m gdsd_jax.evaluate --config ... --checkpoint DIR [--adapter DIR] --output DIR --tasks gsm8k,sudoku=FILE
    python -m gdsd_jax.evaluate --config ... --workdir runs/b --compare runs/a/evaluation
    python -m gdsd_jax.evaluate --config ... --workdir runs/gsm8k --compare-decoding

Without further flags, it evaluates the newest checkpoint of the run in `--workdir` on the test rows of the config's
task under the papers' protocol: the task's evaluation prompt, lengths 128, 256 and 512, one step for every two tokens,
temperature 0, and 256 rows of a planning task or all rows of any other. `config.evaluation` and the flags below change
the protocol. `--tasks` names other tasks, each with a local file of rows if one is given. The file and the settings of
`config.task` apply to that task only.

The command writes `evaluation.json`, `evaluation.md`, `evaluation.png` and `evaluation.jsonl` (the completions) to
`--output`, by default `WORKDIR/evaluation`, and replaces the files of an earlier evaluation. Completions are saved as
they are sampled. After a kill, the same command resumes the evaluation and ends with the same files; a command with
other settings is refused. With `--samples` above 1 and a temperature, `--pass_at 1,4` estimates how often at least one
of that many samples is right. `--compare DIR` samples nothing: it compares the evaluation in the output directory with
the one in DIR, item by item.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gdsd_jax.config import TrainConfig
from gdsd_jax.config.flags import Option, launch
from gdsd_jax.evaluation import reports
from gdsd_jax.evaluation.policy import POLICY_OPTIONS
from gdsd_jax.evaluation.run import output_directory, run, run_decodings
from gdsd_jax.runtime import hosts
from gdsd_jax.runtime.console import Console
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.files import require_writable


def numbers(text: str | None, flag: str) -> tuple[int, ...]:
    """Returns the positive whole numbers in a text such as `"128,256"`; none if the text is None.

    Raises:
      UserError: a part of the text is not a positive whole number.
    """
    parts = [] if text is None else text.split(",")
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
    require_writable(directory, "--output")
    console = hosts.first_only(Console)
    named = [] if tasks is None else [part.partition("=") for part in tasks.split(",")]
    flags |= {"tasks": [(name, file or None) for name, _, file in named], "lengths": numbers(lengths, "--lengths")}
    if compare is not None:
        console.text(reports.compare_evaluations(directory, Path(compare)))
    elif compare_decoding:
        if samples > 1 or temperature > 0 or pass_at is not None:
            raise UserError("--compare-decoding is greedy: leave --samples, --temperature and --pass_at out")
        console.text(run_decodings(config, workdir, directory, **flags))
    else:
        passes = numbers(pass_at, "--pass_at")
        summary = run(
            config, workdir, output=directory, samples=samples, temperature=temperature, pass_at=passes, **flags
        )
        console.print(reports.table(summary))
        console.print(reports.LEGEND, highlight=False, markup=False)
    console.print(f"wrote {directory}", highlight=False, markup=False)


OPTIONS = POLICY_OPTIONS | {
    "tasks": Option(str, None, "NAME or NAME=FILE of each task, separated by commas, instead of the config's."),
    "lengths": Option(str, None, "Completion lengths, such as 128,256."),
    "steps": Option(int, None, "Denoising steps of each completion."),
    "split": Option(str, "test", "Split to evaluate on: train, validation or test."),
    "count": Option(int, None, "Number of rows."),
    "samples": Option(int, 1, "Completions of each row."),
    "temperature": Option(float, 0.0, "Temperature of the sampler; 0 takes the most probable token."),
    "pass_at": Option(str, None, "Numbers k for pass@k, such as 1,4."),
    "compare": Option(str, None, "Directory of an evaluation to compare with the one in --output."),
    "compare_decoding": Option(bool, False, "Compare ways of decoding on the same rows."),
    "output": Option(str, None, "Directory for the results.", written=True),
}

if __name__ == "__main__":
    launch(main, OPTIONS, needs_workdir=False)
