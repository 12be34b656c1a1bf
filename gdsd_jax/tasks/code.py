"""The code task: a Python program in one fenced block, judged by running tests in a sandbox.

Rows come from a local file (JSON lines or array, CSV or Parquet), in one of three forms:

    question, test_cases                                 test_cases: Python statements, one test each
    text or prompt, code, test_list[, test_setup_code, test_imports]    MBPP, also sanitized
    prompt, test, entry_point[, canonical_solution]      HumanEval; the whole program is asked for, signature included

A row becomes {question, tests, test, setup, program, shadowed}: `test` is the first test, which the prompt shows,
`setup` runs before each test, `program` is the reference solution if the file has one. A row of HumanEval keeps its
`prompt`: the prompt's imports and helpers come first in every program, and a bare body completes the prompt's function.

There is no default data set: `config.task.train_path` names the file. The paper trains on AceCode-87K filtered by
difficulty. The default grader reads code as models write it (`graders.programs`); "public" asks for the one form of the
public trainers.

The task is refused, when its rows are read, on a machine without a sandbox (`gdsd_jax.tasks.sandbox`).
`--config.task.name=gdsd_jax.tasks.code:UNSAFE` is the same task without a sandbox: it runs the model's programs with
the rights of the user who trains.
"""

import ast
import builtins
import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path

from gdsd_jax.runtime.errors import UserError
from gdsd_jax.tasks import sandbox, workers
from gdsd_jax.tasks.data import Row, column, held_out, read_records, text_of
from gdsd_jax.tasks.graders import programs
from gdsd_jax.tasks.sandbox import Program, Verdict
from gdsd_jax.tasks.task import PUBLIC, Grader, Task

_OPEN, _FENCE = "```python\n", "```"
# The parser runs in a worker, because some short texts cost it seconds or gigabytes.
_PARSING = workers.Limits(seconds=1.0, megabytes=512)
LOCATING = workers.Limits(seconds=3.0, megabytes=512)
MAX_TESTS = 20_000


def fenced(completion: str) -> str | None:
    """Returns the program of a completion that is prose and then one block fenced as `python`; None for any other.

    Matches what the references' pattern matches, in linear time: no other fence before the block or inside it, and at
    most one newline after it.
    """
    start = completion.find(_FENCE)
    if start < 0 or not completion.startswith(_OPEN, start):
        return None
    end = completion.find(_FENCE, start + len(_OPEN))
    if end < 0 or completion[end:] not in (_FENCE, _FENCE + "\n"):
        return None
    return completion[start + len(_OPEN) : end].strip()


def parse(program: str) -> dict[str, float]:
    """Returns {"parses": 1 or 0}: whether the program is valid Python for this interpreter. Never raises."""
    try:
        ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {"parses": 0.0}
    return {"parses": 1.0}


def format_reward(completion: str) -> float:
    """Returns 1 for a fenced program, 0.5 for one that does not parse (or not within 1 s), 0 for none."""
    text = fenced(completion)
    if text is None:
        return 0.0
    (outcome,) = workers.shared(_PARSING).map(parse, [(text,)])
    return 1.0 if outcome.values == {"parses": 1.0} else 0.5


def program_from(completion: str, row: Row) -> Program:
    """Returns what the public grader gives the sandbox: the last block fenced as `python` or the whole text."""
    _, fence, rest = completion.rpartition(_OPEN)
    return program(rest.partition(_FENCE)[0] if fence else completion, row)


def program(text: str, row: Row) -> Program:
    """Returns a program text with the tests of a row."""
    row = completed(row)
    tests = tuple(f"{row['setup']}\n{test}" for test in row["tests"])
    return Program(text, tests, tuple(row["shadowed"]))


def found_program(completion: str, row: Row) -> tuple[float, Program]:
    """Returns the format reward of a completion, and the program that `graders.programs` finds in it.

    The format reward is 1 for a fenced program that parses, 0.5 for a fenced one that does not (or not within the
    limits), and 0 if no program is fenced.
    """
    row = completed(row)
    names, prompt = tuple(row.get("named", ())) or called(row["tests"]), row.get("prompt", "")
    (outcome,) = workers.shared(LOCATING).map(programs.locate, [(completion, names, prompt)])
    place = outcome.values or {"start": 0.0, "end": 0.0, "fenced": float(_FENCE in completion), "parses": 0.0}
    form = place["fenced"] * (1.0 if place["parses"] else 0.5)
    return form, program(programs.complete(programs.joined(completion, place), names, prompt), row)


def called(tests: list[str]) -> tuple[str, ...]:
    """Returns the names that the tests call, each once, in order."""
    return tuple(dict.fromkeys(re.findall(r"\b([A-Za-z_]\w{0,99})\s?\(", "\n".join(tests)[:MAX_TESTS])))


def score(completion: str, row: Row, backend: str | None = None) -> dict[str, float]:
    """Returns the format reward and, if that is 1, the share of the tests that pass (else 0).

    Each test runs after the program in a fresh namespace.
    """
    form, found = found_program(completion, row)
    return {"format": form, "tests": _passed(found, backend) if form == 1.0 else 0.0}


def measure(completion: str, row: Row, backend: str | None = None) -> dict[str, float]:
    """Returns whether all tests pass."""
    return {"passed": float(_passed(found_program(completion, row)[1], backend) == 1.0)}


def public_score(completion: str, row: Row, backend: str | None = None) -> dict[str, float]:
    """Scores as `score` does, but accepts a program only in a single block, fenced as `python`, at the end."""
    form = format_reward(completion)
    return {"format": form, "tests": _passed(program(fenced(completion), row), backend) if form == 1.0 else 0.0}


def public_measure(completion: str, row: Row, backend: str | None = None) -> dict[str, float]:
    """Returns whether all tests pass."""
    return {"passed": float(_passed(program_from(completion, row), backend) == 1.0)}


class _Refused(Exception):
    """Signals that no sandbox has run the program."""


def _passed(judged: Program, backend: str | None) -> float:
    """Returns the share of a program's tests that pass; 0 if the sandbox refuses it."""
    try:
        return _share(judged, backend)
    except _Refused:
        return 0.0


@functools.lru_cache(maxsize=1024)
def _share(judged: Program, backend: str | None) -> float:
    """Returns the share of the tests that pass.

    Reward and metric are one verdict: a program near its limit of time may pass once and fail the next time.
    """
    ((*verdicts,),) = sandbox.judge([judged], backend=backend)
    if Verdict.REFUSED in verdicts:
        raise _Refused
    return verdicts.count(Verdict.PASSED) / len(verdicts)


# ----------------------------------------------------------------------------------------------------------------------
# Rows


def read(path: Path, *, sandboxed: bool = True) -> list[Row]:
    """Reads the rows of a local file; raises UserError for a row in none of the three forms, or without a sandbox."""
    if sandboxed:
        sandbox.find()
    return [to_row(place, record) for place, record in read_records(path)]


def to_row(place: str, record: Row) -> Row:
    """Returns a row of the task from a record of one of the three forms.

    Raises UserError, naming the place, if the record has none of them.
    """
    if "test_list" in record:
        question, tests = column(place, record, "text", "prompt"), column(place, record, "test_list")
        setup, solution = _setup(record), record.get("code") or ""
        named = defined(solution) if isinstance(solution, str) else set()
    elif "entry_point" in record:
        prompt, entry = text_of(place, record, "prompt"), text_of(place, record, "entry_point")
        question = f"Complete this function and give the whole program.\n{prompt}"
        tests, setup = [f"{text_of(place, record, 'test')}\ncheck({entry})"], ""
        solution = f"{prompt}{record['canonical_solution']}" if record.get("canonical_solution") else ""
        named = {entry}
    else:
        question, tests = column(place, record, "question"), column(place, record, "test_cases")
        setup, solution, named = "", record.get("program") or "", set()
    tests = list(tests) if isinstance(tests, (list, tuple)) else []
    if not tests or not all(isinstance(text, str) for text in (question, setup, solution, *tests)):
        raise UserError(f"{place}: the question must be a text and the tests a list of at least one")
    for number, text in enumerate(tests, start=1):
        _require_test(f"{place}, test {number}", text)
    shadowed = sorted(name for name in named if hasattr(builtins, name))
    fields = {"question": question, "tests": tests, "test": tests[0], "setup": setup}
    if "test_list" not in record and "entry_point" in record:
        fields |= {"test": "", "prompt": prompt, "named": [entry]}
    return {**fields, "program": solution, "shadowed": shadowed}


def _require_test(place: str, text: str) -> None:
    """Raises UserError if a test does not parse, so that nothing passes it, or is empty, so that everything does."""
    try:
        does = any(not isinstance(node, (ast.Pass, ast.Import, ast.ImportFrom)) for node in ast.parse(text).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{place} is not Python ({error}): mend it or remove it") from None
    if not does:
        raise UserError(f"{place} tests nothing, so that every program passes it: remove it")


def completed(row: Row) -> Row:
    """Returns a row of the task; a record of one of the three forms, which a caller from Python may give, becomes one.

    A record needs no question here, since only prompts show it.
    """
    return row if "tests" in row else to_row("a row", {"question": "", **row})


def _setup(record: Row) -> str:
    """Returns what runs before each test of MBPP; the sanitized edition has imports instead of a setup."""
    imports = record.get("test_imports")
    lines = [record.get("test_setup_code") or "", *(imports if isinstance(imports, (list, tuple)) else [])]
    return "\n".join(filter(None, map(str, lines)))


def defined(program: str) -> set[str]:
    """Returns the names of the functions and classes that a program defines at its top level."""
    try:
        body = ast.parse(program).body
    except (SyntaxError, ValueError):
        return set()
    return {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def _no_source(split: str, count: int | None, seed: int) -> list[Row]:
    name = {"train": "train_path", "validation": "validation_path", "test": "eval_path"}[split]
    raise UserError(f"the code task has no data of its own: name a file with config.task.{name}")


def _held_out(row: Row) -> bool:
    return held_out(row["question"])


_SHOWN = (
    {
        "question": "Write a function second_largest(values) that returns the second largest of the distinct values.",
        "test_cases": ["assert second_largest([3, 1, 3, 2]) == 2", "assert second_largest([-1, -5]) == -5"],
        "program": "def second_largest(values):\n    return sorted(set(values))[-2]",
    },
    {
        "question": "Write a function count_words(text) that maps each word of the text to how often it occurs.",
        "test_cases": ["assert count_words('a b a') == {'a': 2, 'b': 1}", "assert count_words('') == {}"],
        "program": "from collections import Counter\n\ndef count_words(text):\n    return dict(Counter(text.split()))",
    },
)

TASK = Task(
    name="code",
    source=_no_source,
    read=read,
    score=score,
    measure=measure,
    weights={"format": 1.0, "tests": 1.0},
    metrics_named=("passed",),
    template="Write a Python program for this task.\n\n{question}\n\nIt must pass tests such as this one:\n{test}\n\n"
    "Explain your approach briefly, then end with the complete program in one fenced block:\n```python\n```",
    answer_template="```python\n{program}\n```",
    examples=tuple(to_row("a worked example", record) for record in _SHOWN),
    held_out=_held_out,
    threads=workers.Workers(_PARSING).count,
    graders={PUBLIC: Grader(public_score, public_measure)},
)


def _unsafe(function: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
    return functools.partial(function, backend=sandbox.UNSAFE)


UNSAFE = dataclasses.replace(
    TASK,
    name="code_unsafe",
    read=functools.partial(read, sandboxed=False),
    score=_unsafe(score),
    measure=_unsafe(measure),
    graders={PUBLIC: Grader(_unsafe(public_score), _unsafe(public_measure))},
)
