"""The task of docs/new_task.md: put the letters of a word in alphabetical order."""

import random
from pathlib import Path

from gdsd_jax.tasks import Task
from gdsd_jax.tasks.data import Row, column, draw, held_out, read_records
from gdsd_jax.tasks.format import last_answer
from gdsd_jax.tasks.workers import Limits


def read(path: Path) -> list[Row]:
    """Returns the rows of a local file, from its column `word`."""
    return [{"word": str(column(place, record, "word"))} for place, record in read_records(path)]


def split_of(word: str) -> str:
    """Returns the only split in which a word may occur; one in twenty belongs to each of the evaluation splits."""
    return "test" if held_out(f"test {word}") else "validation" if held_out(word) else "train"


def source(split: str, count: int | None, seed: int) -> list[Row]:
    """Returns random words of five letters, if there is no file; evaluation splits do not depend on the seed."""
    letters = random.Random(f"{split}:{seed if split == 'train' else 0}")
    rows: list[Row] = []
    while len(rows) < (count or 256):
        word = "".join(letters.choices("abcdefghij", k=5))
        if split_of(word) == split:
            rows.append({"word": word})
    return draw(rows, count, seed, "generated words")


def score(completion: str, row: Row) -> dict[str, float]:
    """Returns two components: the share of letters in their place, and whether there is an answer at all."""
    answer, wanted = last_answer(completion), sorted(row["word"])
    right = sum(a == b for a, b in zip((answer or "").strip(), wanted, strict=False))
    return {"letters": right / len(wanted), "answered": float(answer is not None)}


def measure(completion: str, row: Row) -> dict[str, float]:
    return {"accuracy": float((last_answer(completion) or "").strip() == "".join(sorted(row["word"])))}


TASK = Task(
    name="letters",
    source=source,
    read=read,
    score=score,
    measure=measure,
    weights={"letters": 1.0, "answered": 0.1},
    metrics_named=("accuracy",),
    template="Write the letters of {word} in alphabetical order, between <answer> and </answer>.",
    answer_template="<answer>{ordered}</answer>",
    reference=lambda row: {**row, "ordered": "".join(sorted(row["word"]))},
    limits=Limits(seconds=2.0, processes=2),
)
