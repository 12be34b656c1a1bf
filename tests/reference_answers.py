"""Every row of a data set, answered with its own solution: full marks, and none for the answer once it is altered.

    python tests/reference_answers.py --data DIR

Reads what DIR has of the public files (`FILES`), writes each row's answer in the task's own format and scores it by the
task's own reward. Prints one line per task with the rows that fall short, and ends with 1 where an altered answer still
counts. A row that falls short is wrong in the data or says something of the reward; which, is for a person to look at.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gdsd_jax.tasks import TASKS
from gdsd_jax.tasks.data import Row

FILES = {
    "sudoku": "4x4_test_sudoku.csv",
    "countdown": "countdown_cd3_test.jsonl",
    "gsm8k": "gsm8k_test.jsonl",
    "gsm8k_xml": "gsm8k_test.jsonl",
    "math": "math500_test.jsonl",
    "math_xml": "math500_test.jsonl",
}


def _next_digit(text: str) -> str:
    """The text with its first digit one higher, 9 to 0; another text where it has none."""
    index = next((index for index, character in enumerate(text) if character in "0123456789"), None)
    if index is None:
        return "\\text{something else}"
    return text[:index] + str((int(text[index]) + 1) % 10) + text[index + 1 :]


def _alter_sudoku(row: Row) -> Row:
    index = row["puzzle"].index("0")
    return {
        **row,
        "solution": row["solution"][:index] + str(int(row["solution"][index]) % 4 + 1) + row["solution"][index + 1 :],
    }


def _alter_countdown(row: Row) -> Row:
    return {**row, "expression": _next_digit(TASKS["countdown"].reference(row)["expression"])}


def _alter_answer(row: Row) -> Row:
    return {**row, "answer": _next_digit(row["answer"])}


class Marks(NamedTuple):
    """The component that says whether the answer is right, what an altered answer may get of it, the other components'
    full values for a row, and how an answer is altered."""

    component: str
    full: float
    altered: float
    others: Callable[[Row], dict[str, float]]
    alter: Callable[[Row], Row]


def _form(row: Row) -> dict[str, float]:
    # What follows "<answer>\n" costs 0.001 a character, also where it is as short as can be.
    return {"tags": 0.5 - 0.001 * len(f"{row['answer']}\n</answer>\n"), "loose": 0.5, "strict": 0.5, "integer": 0.5}


MARKS = {
    "sudoku": Marks("cells_correct", 1.0, 0.99, lambda row: {}, _alter_sudoku),
    "countdown": Marks("equation", 1.0, 0.1, lambda row: {}, _alter_countdown),
    "gsm8k": Marks("correct", 1.0, 0.0, lambda row: {}, _alter_answer),
    "gsm8k_xml": Marks("correct", 2.0, 0.0, _form, _alter_answer),
    "math": Marks("correct", 2.0, 0.0, lambda row: {}, _alter_answer),
    "math_xml": Marks("correct", 2.0, 0.0, lambda row: {"format": 1.0}, _alter_answer),
}


class Report(NamedTuple):
    """Figures of one task. `short` has the row numbers, from 1, and what each lacks; `counted` those of altered answers
    that counted as right."""

    task: str
    rows: int
    full: int
    altered: int
    seconds: float
    short: dict[int, str]
    counted: list[int]


def run(name: str, path: Path) -> Report:
    """Scores the reference answers and the altered answers of a file."""
    task, marks = TASKS[name], MARKS[name]
    rows = task.rows("test", path=path)
    start = time.perf_counter()
    found = task.rewards([task.answer(row) for row in rows], rows)
    altered = task.rewards([task.answer(marks.alter(row)) for row in rows], rows)[marks.component]
    seconds = time.perf_counter() - start
    short = {}
    for index, row in enumerate(rows):
        wanted = {marks.component: marks.full, **marks.others(row)}
        lacking = [
            f"{key} {found[key][index]:g}" for key, value in wanted.items() if not np.isclose(found[key][index], value)
        ]
        if lacking:
            short[index + 1] = f"{', '.join(lacking)}: {row.get('answer', '')}"
    # Also where it is NaN: an answer that was not judged was not found wrong.
    counted = [index + 1 for index, value in enumerate(altered) if not value <= np.float32(marks.altered)]
    return Report(name, len(rows), len(rows) - len(short), len(rows) - len(counted), round(seconds, 2), short, counted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory of the files")
    directory = parser.parse_args().data
    wrong = 0
    for name, file in FILES.items():
        if (directory / file).exists():
            report = run(name, directory / file)
            print(json.dumps(report._asdict(), ensure_ascii=False), flush=True)
            wrong += len(report.counted)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
