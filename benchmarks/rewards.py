"""Measures rewards in worker processes against the plain loop of the public trainers.

    python -m benchmarks.rewards [--workloads math,code,gsm8k,sudoku] [--threads 2] [--turns 3] [--json FILE]

One turn rewards a batch of completions, half of them wrong. `inline` calls the library in the trainer's own process,
one completion after the other, without effective limits: math-verify for `math`, a plain `python` for every program of
`code`, the task's own function for the others. `task` is what training calls: worker processes, limits on each item,
and the sandbox for programs. `public` is the same with the public trainers' grader. CPU seconds count all processes.
Rewards run beside the trainer, so with several `--threads` look at the wall clock.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Mapping

from benchmarks import measure

COUNTS = {"math": 200, "code": 40, "gsm8k": 1000, "sudoku": 1000}
PROGRAM = "def add(a, b):\n    return a {} b"
TESTS = ["assert add(2, 3) == 5", "assert add(-1, 1) == 0", "assert add(0, 0) == 0"]


def items(name: str) -> list[tuple[str, dict]]:
    """Returns pairs of completion and row of a task, right and wrong completions in turn."""
    from gdsd_jax.tasks import resolve

    count = COUNTS[name]
    if name == "sudoku":
        rows = resolve(name).rows("test", count=256)
        rows = [rows[n % len(rows)] for n in range(count)]
        return [(f"<answer>{row['puzzle' if n % 2 else 'solution']}</answer>", row) for n, row in enumerate(rows)]
    if name == "code":
        row = {"setup": "", "tests": TESTS, "shadowed": ()}
        return [(f"It adds.\n```python\n{PROGRAM.format('+-'[n % 2])}\n```", row) for n in range(count)]
    if name == "gsm8k":
        return [(f"It is a sum. The answer is {n + n % 2}.", {"answer": str(n)}) for n in range(count)]
    fractions = [(f"\\frac{{{n + n % 2}}}{{{2 * n + 3}}}", f"\\frac{{{2 * n}}}{{{4 * n + 6}}}") for n in range(count)]
    return [(f"So it is $\\boxed{{{answer}}}$.", {"answer": gold}) for answer, gold in fractions]


def run_program(completion: str, row: Mapping) -> None:
    """Runs the program in a completion with each test of the row, in a plain `python`."""
    from gdsd_jax.tasks import code

    for test in row["tests"]:
        command = [sys.executable, "-c", f"{code.fenced(completion)}\n{test}"]
        subprocess.run(command, capture_output=True, timeout=10, check=False)


def verify(completion: str, row: Mapping) -> None:
    """Compares a completion with the row's answer by math-verify."""
    import math_verify

    math_verify.verify(math_verify.parse(f"${row['answer']}$"), math_verify.parse(completion))


def prepare(job: measure.Job) -> measure.Contest:
    from gdsd_jax.tasks import resolve

    grader = "public" if job.variant == "public" else "robust"
    task, pairs = resolve(job.workload, grader=grader), items(job.workload)
    completions, rows = [completion for completion, _ in pairs], [row for _, row in pairs]
    plain: Callable = {"math": verify, "code": run_program}.get(job.workload, task.score)

    def inline() -> None:
        for completion, row in pairs:
            plain(completion, row)

    turns = itertools.count()

    def rewards() -> None:
        if job.workload != "code":
            task.rewards(completions, rows)
            return
        # Verdicts of programs are cached, so every turn gets new programs.
        turn = next(turns)
        fresh = [text.replace("```python\n", f"```python\n# {turn}.{n}\n") for n, text in enumerate(completions)]
        task.rewards(fresh, rows)

    return measure.Contest(inline if job.variant == "inline" else rewards)


BENCH = measure.Bench(
    "benchmarks.rewards",
    __doc__,
    prepare,
    references=("inline",),
    variants=("task", "public"),
    workloads=tuple(COUNTS),
    known=tuple(COUNTS),
)

if __name__ == "__main__":
    measure.main(BENCH)
