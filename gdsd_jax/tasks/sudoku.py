"""4x4 Sudoku: all 288 grids, puzzles split by solution, and the share of empty cells filled correctly as reward.

A grid is a string of 16 characters, row by row; 0 is an empty cell. Only 288 solved grids exist, so a split by puzzle
would show every answer in training. Therefore the solved grids are split: 192 train, 32 validation, 64 test.

A local file has the columns `Puzzle` and `Solution`. It is used as it is, without regard to the split; `overlap` counts
how many of its solutions belong to each split. The public test file (500 puzzles, 8 cells empty) has 229 solutions:
155 of our training, 23 of our validation, 51 of our test grids. A policy trained on generated puzzles has seen most of
its answers: report it separately. 124 of its puzzles have further solutions, which score as wrong.
"""

import hashlib
import itertools
import random
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Int8

from gdsd_jax.runtime.errors import UserError
from gdsd_jax.tasks.data import Row, column, read_records
from gdsd_jax.tasks.format import last_answer
from gdsd_jax.tasks.prompting import ANSWER_FORMAT
from gdsd_jax.tasks.task import PUBLIC, SPLITS, Grader, Task

SPLIT_SIZES = {"train": 192, "validation": 32, "test": 64}
DEFAULT_COUNTS = {"train": 4096, "validation": 256, "test": 256}
EMPTY_CELLS = (8, 9, 10, 11)
_CHUNK = 256


@cache
def grids() -> tuple[str, ...]:
    """Returns all 288 solved grids, in lexicographic order."""
    lines = ["".join(line) for line in itertools.permutations("1234")]
    pairs = [(a, b) for a, b in itertools.product(lines, lines) if set(a[:2]) == set(b[2:])]
    clash = {(a, b) for a, b in itertools.product(lines, lines) if any(map(str.__eq__, a, b))}
    return tuple(
        a + b + c + d
        for (a, b), (c, d) in itertools.product(pairs, pairs)
        if not {(a, b), (a, c), (a, d), (b, c), (b, d), (c, d)} & clash
    )


@cache
def solutions(split: str) -> tuple[str, ...]:
    """Returns the solved grids of a split, in lexicographic order.

    Grids are assigned to splits in the order of a salted hash, which no version of any library can change.
    """
    dealt = sorted(grids(), key=lambda grid: hashlib.sha256(f"sudoku-4x4:{grid}".encode()).digest())
    start = sum(SPLIT_SIZES[name] for name in SPLITS[: SPLITS.index(split)])
    return tuple(sorted(dealt[start : start + SPLIT_SIZES[split]]))


def overlap(rows: Iterable[Row]) -> dict[str, int]:
    """Counts how many different solutions of these rows belong to each split."""
    present = {row["solution"] for row in rows}
    return {split: len(present & set(solutions(split))) for split in SPLITS}


def generate(split: str, count: int | None = None, seed: int = 0) -> list[Row]:
    """Generates puzzles with exactly one solution and 8 to 11 empty cells, each number equally likely.

    With a larger count, the first rows of a split and seed stay the same. Validation and test puzzles do not depend on
    the seed.

    Args:
      count: the number of puzzles; None for 4096 training, 256 validation or 256 test puzzles.
    """
    count = DEFAULT_COUNTS[split] if count is None else count
    seed = seed if split == "train" else 0
    rows: list[Row] = []
    for chunk in range(-(-count // _CHUNK)):
        rows += _puzzles(split, seed, chunk)
    return rows[:count]


def _puzzles(split: str, seed: int, chunk: int) -> list[Row]:
    # RandomState is the one stream of NumPy that is guaranteed never to change, so the test puzzles stay the same.
    random = np.random.RandomState([SPLITS.index(split), chunk, seed % 2**32])
    chosen = [solutions(split)[index] for index in random.randint(SPLIT_SIZES[split], size=_CHUNK)]
    filled = _cells(chosen)
    empty_cells = random.choice(EMPTY_CELLS, size=(_CHUNK, 1))
    empty = np.zeros((_CHUNK, 16), bool)
    pending = np.arange(_CHUNK)
    while pending.size:
        order = random.random_sample((pending.size, 16)).argsort(axis=1)
        empty[pending] = order < empty_cells[pending]
        pending = pending[~unique(np.where(empty[pending], 0, filled[pending]))]
    puzzles = np.where(empty, 0, filled)
    return [
        {"puzzle": "".join(map(str, puzzle)), "solution": solution}
        for puzzle, solution in zip(puzzles.tolist(), chosen, strict=True)
    ]


def unique(puzzles: Int8[np.ndarray, "N 16"]) -> Bool[np.ndarray, "N"]:
    """Returns whether exactly one of the 288 grids agrees with the clues of each puzzle; 0 is an empty cell."""
    agreeing = _one_hot(puzzles) @ _one_hot_grids()
    return (agreeing == (puzzles > 0).sum(axis=1, keepdims=True)).sum(axis=1) == 1


@cache
def _one_hot_grids() -> Float32[np.ndarray, "64 288"]:
    return _one_hot(_cells(grids())).T


def _one_hot(cells: Int8[np.ndarray, "N 16"]) -> Float32[np.ndarray, "N 64"]:
    return (cells[:, :, None] == np.arange(1, 5)).reshape(len(cells), 64).astype(np.float32)


def _cells(texts: Iterable[str]) -> Int8[np.ndarray, "N 16"]:
    return np.array([list(map(int, text)) for text in texts], np.int8)


def read(path: Path) -> list[Row]:
    """Reads the rows of a local file with the columns `Puzzle` and `Solution`, also in lower case; keeps leading zeros.

    Raises UserError, naming the row, if a puzzle or solution is not 16 characters of the right digits, a solution is
    not a solved grid, or the two disagree.
    """
    rows = []
    for place, record in read_records(path):
        puzzle = str(column(place, record, "Puzzle", "puzzle")).strip()
        solution = str(column(place, record, "Solution", "solution")).strip()
        if not re.fullmatch("[0-4]{16}", puzzle):
            raise UserError(f"{place}: the puzzle must be 16 digits 0-4 (keep leading zeros), got {puzzle[:40]!r}")
        if solution not in grids():
            raise UserError(f"{place}: the solution is not a solved 4x4 grid: {solution[:40]!r}")
        if any(clue not in ("0", digit) for clue, digit in zip(puzzle, solution, strict=True)):
            raise UserError(f"{place}: the solution contradicts the puzzle")
        rows.append({"puzzle": puzzle, "solution": solution})
    return rows


def _share(cells: str, row: Row) -> float:
    """Returns the share of the puzzle's empty cells that `cells` fills in correctly; 0 if no cell is empty."""
    empty = [index for index, clue in enumerate(row["puzzle"]) if clue == "0"]
    right = sum(cells[index : index + 1] == row["solution"][index] for index in empty)
    return right / len(empty) if empty else 0.0


def score(completion: str, row: Row) -> dict[str, float]:
    """Returns the training reward: the metric's share of the empty cells.

    The reward is 0 if no complete `<answer>` has digits.
    """
    answered = re.search("[0-9]", last_answer(completion) or "")
    return {"cells_correct": measure(completion, row)["cells"] if answered else 0.0}


def public_score(completion: str, row: Row) -> dict[str, float]:
    """Returns the public trainers' reward: digits of the last `<answer>` in order; missing cells are wrong.

    Digits of other scripts, and digits in words ("Row1:"), take up a cell and are wrong there, as in the GDSD reward.
    """
    return {"cells_correct": _share("".join(filter(str.isdigit, last_answer(completion) or "")), row)}


def measure(completion: str, row: Row) -> dict[str, float]:
    """Returns the papers' metric: `cells` (their accuracy) and `puzzles` (all 16 cells right, which keeps the clues).

    Digits are those of the last answer, closed or not; without any, the last run of 16 digits anywhere (a completion
    that first repeats the puzzle answers last). They are padded with 0 or cut to 16. `cells` divides by the empty cells
    of the item, answered or not; the mean over items is the papers' share over all cells where all items have equally
    many empty ones, as in the public file.
    """
    answer = last_answer(completion)
    if answer is None:
        answer = completion.rpartition("<answer>")[2] if "<answer>" in completion else ""
    digits = "".join(re.findall("[0-9]", answer))
    if not digits:
        digits = next(reversed(re.findall("(?<![0-9])[0-9]{16}(?![0-9])", completion)), "")
    cells = digits[:16].ljust(16, "0")
    return {"cells": _share(cells, row), "puzzles": float(cells == row["solution"])}


_QUESTION = """The 4x4 Sudoku below is written as 16 characters, row by row from the top; 0 is an empty cell.
Replace every 0 by a digit from 1 to 4 so that
1. each row contains 1, 2, 3 and 4 exactly once,
2. each column contains 1, 2, 3 and 4 exactly once,
3. each of the four 2x2 boxes contains 1, 2, 3 and 4 exactly once.
Keep the given digits. Write the finished grid as 16 characters, row by row, between the answer tags.
"""

_EXAMPLE = """
For instance, for the puzzle 0023300001300314 a correct reply is
<reasoning>
Row 4 is 0314 and lacks 2: 2314. Row 1 is 0023; column 2 has a 1 already, so its second cell is 4: 1423.
Row 3 is 0130; column 1 has a 2 already, so it begins with 4: 4132. Row 2 is 3000; the columns leave 2, 4 and 1: 3241.
</reasoning>
<answer>
1423324141322314
</answer>
"""

_PUZZLE = """
Puzzle: {puzzle}"""


def careless(row: Row, rate: float, generator: random.Random) -> Row:
    """Returns the row with a 1 written into the share `rate` of the empty cells, whatever the right digit is."""
    solution = [
        "1" if cell == "0" and generator.random() < rate else digit
        for cell, digit in zip(row["puzzle"], row["solution"], strict=True)
    ]
    return {**row, "solution": "".join(solution)}


TASK = Task(
    name="sudoku",
    source=generate,
    read=read,
    score=score,
    measure=measure,
    weights={"cells_correct": 1.0},
    metrics_named=("cells", "puzzles"),
    template=f"{ANSWER_FORMAT}\n\n{_QUESTION}{_PUZZLE}",
    answer_template="<answer>{solution}</answer>",
    careless=careless,
    examples=(
        {"puzzle": "0040000134102034", "solution": "1243432134122134"},
        {"puzzle": "4120320000302001", "solution": "4123321414322341"},
        {"puzzle": "2000314043200030", "solution": "2413314243211234"},
    ),
    evaluation={
        "template": f"{ANSWER_FORMAT}\n\n{_QUESTION}{_EXAMPLE}{_PUZZLE}",
        "assistant_prefix": "<reasoning>\n",
    },
    evaluation_rows=256,
    graders={PUBLIC: Grader(public_score, measure)},
)
