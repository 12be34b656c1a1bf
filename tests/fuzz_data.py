"""Damages data files: rows of every task in every kind of file, demonstrations, and samples of lm-eval."""

import gzip
import io
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from damage import changed, damaged

from gdsd_jax.evaluation.samples import judge
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.tasks import TASKS
from gdsd_jax.tasks.chats import held_out, read_demonstrations
from gdsd_jax.tasks.code import UNSAFE

_CHAT = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
_SUDOKU = {"puzzle": "1000040000300001", "solution": "1243341221344321"}
# The forms of a row that are read, by task; the tests of code are not run.
ROWS: dict[str, list[dict[str, Any]]] = {
    "sudoku": [_SUDOKU, {"Puzzle": _SUDOKU["puzzle"], "Solution": _SUDOKU["solution"]}],
    "countdown": [{"nums": [3, 5, 7], "target": 22}, {"input": "3,5,7", "output": "22"}],
    "gsm8k": [{"question": "How many?", "answer": "It is <<2+3=5>>5.\n#### 5"}],
    "math": [
        {"problem": "Solve $x=1$.", "solution": r"It is $\boxed{1}$.", "answer": "1"},
        {"question": "Solve $x=2$.", "solution": r"It is $\boxed{2}$."},
    ],
    "code": [
        {"question": "Add.", "test_cases": ["assert add(1, 1) == 2"], "program": "def add(a, b):\n    return a + b"},
        {"text": "Add.", "test_list": ["assert f(1) == 2"], "test_setup_code": "", "code": "def f(a): return a + 1"},
        {"prompt": "def f(a):", "entry_point": "f", "test": "def check(f): pass", "canonical_solution": "\n    pass"},
    ],
    "chats": [
        {"prompt": "2+2?", "completion": "4"},
        {"messages": _CHAT},
        {"prompt": _CHAT[:1], "completion": _CHAT[1:]},
    ],
    "samples": [{"doc": _SUDOKU, "filtered_resps": ["<answer>1243341221344321</answer>"]}],
}  # fmt: skip


def _parquet(rows: list[Any]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def _csv(rows: list[Any]) -> bytes:
    cell = lambda value: '"' + str(value).replace('"', '""') + '"'  # noqa: E731
    lines = [rows[0], *(row.values() for row in rows)]
    return "\n".join(",".join(map(cell, line)) for line in lines).encode("utf-8", "surrogatepass")


def _lines(rows: list[Any]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


WRITERS: dict[str, Callable[[list[Any]], bytes]] = {
    "jsonl": _lines,
    "json": lambda rows: json.dumps(rows).encode(),
    "csv": _csv,
    "parquet": _parquet,
    "jsonl.gz": lambda rows: gzip.compress(_lines(rows)),
}


def contents(draw: random.Random, kind: str, rows: list[Any]) -> bytes:
    """Returns a file of these rows, of which some are odd or whose bytes are damaged."""
    whole = WRITERS[kind](rows)
    if draw.random() < 0.4:
        return damaged(draw, whole)
    try:
        return WRITERS[kind](changed(draw, rows))
    except (pyarrow.ArrowException, OverflowError, TypeError, AttributeError, KeyError, IndexError, ValueError):
        return damaged(draw, whole)  # this kind of file cannot hold the odd value


def plain(value: Any) -> None:
    """Raises AssertionError if a row holds NaN or infinity."""
    if isinstance(value, float):
        assert math.isfinite(value), "NaN was let through"
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        plain(item)


def read(name: str, path: Path) -> None:
    """Reads a file as training or an evaluation would, up to the texts that the tokenizer gets."""
    if name == "samples":
        plain(judge(path, TASKS["sudoku"]))
        return
    if name == "chats":
        for found in read_demonstrations(path):
            held_out(found.messages, 0.5)
            assert isinstance(found.answer, str) and all(isinstance(turn["content"], str) for turn in found.messages)
        return
    task = UNSAFE if name == "code" else TASKS[name]
    for row in task.read(path):
        plain(row)
        if task.held_out is not None:
            task.held_out(row)
        texts = [turn["content"] for turn in task.messages(row)]
        try:
            texts.append(task.answer(row))
        except UserError as error:
            assert "leave" in str(error)  # a puzzle without a solution
        assert all(isinstance(text, str) for text in texts)


def case(world: Any, draw: random.Random) -> None:
    name = draw.choice(list(ROWS))
    kind = "jsonl" if name == "samples" else draw.choice(list(WRITERS))
    form = draw.choice(ROWS[name])
    if kind == "csv":
        form = {column: value for column, value in form.items() if isinstance(value, (str, int))} or form
    path = world.directory / f"data.{kind}"
    path.write_bytes(contents(draw, kind, [form] * draw.randint(1, 3)))
    read(name, path)
