r"""Countdown: reach a target from three numbers, each used exactly once, with + - * / and parentheses.

Problems are generated and split by a hash of (sorted numbers, target), or read from a local file whose rows have one
of two public forms: `{"input": "3,5,7", "output": "22"}` or `{"nums": [3, 5, 7], "target": 22}`. A file is used as it
is, without regard to the split.

An answer is untrusted text. A small parser reads it and computes it in exact fractions; nothing is ever evaluated as
code. An answer that the parser does not know, or finds too long, is unusable; it is not an error.
"""

import hashlib
import random
import re
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from gdsd_jax.runtime.errors import UserError
from gdsd_jax.tasks.data import Row, column, read_records
from gdsd_jax.tasks.format import last_answer, last_boxed
from gdsd_jax.tasks.graders import arithmetic
from gdsd_jax.tasks.graders.arithmetic import MAX_EXPRESSION, OPERATIONS, PRECEDENCE, compute
from gdsd_jax.tasks.prompting import ANSWER_FORMAT
from gdsd_jax.tasks.task import PUBLIC, Grader, Task

NUMBERS = 3
LARGEST = 100
DEFAULT_COUNTS = {"train": 4096, "validation": 256, "test": 256}
# As in the GDSD reward, which computes in floating point. With three integers up to 100 no wrong answer is this close.
TOLERANCE = Fraction(1, 100_000)


class _Term(NamedTuple):
    value: Fraction
    text: str
    precedence: int


def solves(expression: str, row: Row) -> bool:
    """Returns whether the expression uses exactly the row's numbers and reaches its target.

    Every run of digits counts as a number used, so `3.` uses a 3, and `5.0` uses a 5 and a 0.
    """
    if len(expression.strip()) > MAX_EXPRESSION:
        return False
    if sorted(map(int, re.findall("[0-9]+", expression))) != sorted(row["numbers"]):
        return False
    value = compute(expression)
    return value is not None and abs(value - Fraction(row["target"])) < TOLERANCE


def score(completion: str, row: Row) -> dict[str, float]:
    """Returns the training reward: 1 right and inside the tags, 0.1 for other text there, 0 without closed tags."""
    if last_answer(completion) is None:
        return {"equation": 0.0}
    return {"equation": max(0.1, measure(completion, row)["accuracy"])}


def measure(completion: str, row: Row) -> dict[str, float]:
    """Returns the metric: 1 if the answer is one expression that solves the problem, however it is written, else 0."""
    return {"accuracy": float(arithmetic.right(completion, row["numbers"], row["target"]))}


def public_score(completion: str, row: Row) -> dict[str, float]:
    """Returns the public trainers' reward of the last `<answer>`: 1 right, 0.1 wrong or unusable, 0 if absent."""
    answer = last_answer(completion)
    return {"equation": 0.0 if answer is None else 1.0 if solves(answer, row) else 0.1}


def public_measure(completion: str, row: Row) -> dict[str, float]:
    r"""Returns the papers' metric: 1 if right, else 0. It is more lenient about form than their reward.

    Reads the last `\boxed{}`, else the last `<answer>`, else the whole text. LaTeX operators are understood. If a
    number follows an equals sign, only the part before the sign counts.
    """
    answer = last_boxed(completion)
    if answer is None:
        answer = last_answer(completion)
    if answer is None:
        answer = completion
    for latex, symbol in (("\\times", "*"), ("\\cdot", "*"), ("\\div", "/")):
        answer = answer.replace(latex, symbol)
    # The look-behind and the possessive quantifier keep the search linear.
    equation = re.search(r"(?<![-0-9+*/() ])([-0-9+*/() ]++)=[0-9. ]", answer)
    return {"accuracy": float(solves(equation[1] if equation else answer, row))}


def _combine(left: _Term, symbol: str, right: _Term) -> _Term | None:
    """Returns `left symbol right` with the necessary parentheses, or None for a division by zero."""
    if symbol == "/" and right.value == 0:
        return None
    precedence = PRECEDENCE[symbol]
    first = f"({left.text})" if left.precedence < precedence else left.text
    bare = right.precedence > precedence or (right.precedence == precedence and symbol in "+*")
    second = right.text if bare else f"({right.text})"
    return _Term(OPERATIONS[symbol](left.value, right.value), first + symbol + second, precedence)


def _terms(numbers: list[int]) -> list[_Term]:
    return [_Term(Fraction(number), str(number), 4) for number in numbers]


def solve(numbers: list[int], target: int) -> str | None:
    """Returns an expression that reaches the target and uses each number once, or None if there is none."""

    def search(terms: list[_Term]) -> str | None:
        if len(terms) == 1:
            return terms[0].text if terms[0].value == target else None
        for i, left in enumerate(terms):
            for j, right in enumerate(terms):
                rest = [term for k, term in enumerate(terms) if k not in (i, j)]
                for symbol in OPERATIONS if i != j else ():
                    term = _combine(left, symbol, right)
                    found = search([*rest, term]) if term else None
                    if found:
                        return found
        return None

    return search(_terms(numbers))


def split_of(numbers: list[int], target: int) -> str:
    """Returns the split a problem belongs to, by a hash of (sorted numbers, target): 80 % train, 10 % each other."""
    problem = f"countdown:{sorted(numbers)}:{target}"
    bucket = int.from_bytes(hashlib.sha256(problem.encode()).digest()[:8]) % 10
    return ("test", "validation")[bucket] if bucket < 2 else "train"


def generate(split: str, count: int | None = None, seed: int = 0) -> list[Row]:
    """Returns solvable problems: three numbers and a target from 1 to 100, with a solution (`expression`).

    With a larger count, the first rows of a split and seed stay the same. Validation and test problems do not depend on
    the seed.

    Args:
      count: the number of problems; None for 4096 training, 256 validation or 256 test problems.
    """
    count = DEFAULT_COUNTS[split] if count is None else count
    draw = random.Random(f"countdown:{split}:{seed if split == 'train' else 0}")
    rows: list[Row] = []
    while len(rows) < count:
        numbers = [draw.randint(1, LARGEST) for _ in range(NUMBERS)]
        terms = _terms(draw.sample(numbers, NUMBERS))
        while len(terms) > 1:
            pair = [terms.pop(), terms.pop()]
            term = _combine(pair[0], draw.choice("+-*/"), pair[1])
            if term is None:
                break
            terms.insert(draw.randint(0, len(terms)), term)
        if len(terms) != 1 or terms[0].value.denominator != 1 or not 1 <= terms[0].value <= LARGEST:
            continue
        target = int(terms[0].value)
        if split_of(numbers, target) == split:
            rows.append({"numbers": numbers, "target": target, "expression": terms[0].text})
    return rows


def read(path: Path) -> list[Row]:
    """Reads the rows of a local file in either public form.

    Rows of the `nums` form that do not have three numbers are left out.

    Raises UserError, naming the row, if a row has neither form or values that are not integers, or a row of the `input`
    form does not have three numbers; and if no row has three numbers.
    """
    rows = []
    for place, record in read_records(path):
        if "nums" in record:
            if not isinstance(record["nums"], list):
                raise UserError(f"{place}: nums must be a list of integers")
            row = _row(place, record["nums"], column(place, record, "target"))
        else:
            row = _row(place, str(column(place, record, "input", "nums")).split(","), column(place, record, "output"))
            if len(row["numbers"]) != NUMBERS:
                raise UserError(f"{place}: {NUMBERS} numbers are needed, found {len(row['numbers'])}")
        if len(row["numbers"]) == NUMBERS:
            rows.append(row)
    if not rows:
        raise UserError(f"{path} has no row with {NUMBERS} numbers")
    return rows


def _row(place: str, numbers: list[Any], target: Any) -> Row:
    try:
        # The conversion goes through str, because int() alone would cut 7.5 to 7.
        row = {"numbers": [int(str(number)) for number in numbers], "target": int(str(target))}
    except ValueError:
        raise UserError(
            f"{place}: numbers and target must be integers, got {numbers!r:.80} and {target!r:.40}"
        ) from None
    if min(row["numbers"], default=0) < 0:
        raise UserError(f"{place}: numbers must be at least 0, as a sign in an answer is an operator: {numbers!r:.80}")
    return row


def reference(row: Row) -> Row:
    """Returns the row with its `expression`, which is found by search if the row has none.

    Raises UserError if no expression reaches the target.
    """
    expression = row.get("expression") or solve(row["numbers"], row["target"])
    if expression is None:
        raise UserError(
            f"no expression makes {row['target']} of {row['numbers']}: leave this row out of supervised training"
        )
    return {**row, "expression": expression}


_QUESTION = """Write an arithmetic expression that equals the target.
Use only the given numbers, each of them exactly once, with the operations + - * / and parentheses.
Put only the finished expression between the answer tags.
"""

_EXAMPLE = """Do not write an equals sign there.

For instance, for the numbers [3, 5, 7] and the target 22 a correct reply is
<reasoning>
3*5 is 15, and 15 needs 7 more to be 22.
</reasoning>
<answer>
3*5+7
</answer>
"""

_PROBLEM = """
Numbers: {numbers}
Target: {target}"""

TASK = Task(
    name="countdown",
    source=generate,
    read=read,
    score=score,
    measure=measure,
    weights={"equation": 1.0},
    metrics_named=("accuracy",),
    template=f"{ANSWER_FORMAT}\n\n{_QUESTION}{_PROBLEM}",
    answer_template="<answer>{expression}</answer>",
    reference=reference,
    examples=(
        {"numbers": [3, 5, 7], "target": 22, "expression": "3*5+7"},
        {"numbers": [10, 4, 60], "target": 24, "expression": "60*4/10"},
        {"numbers": [8, 25, 2], "target": 34, "expression": "2*(25-8)"},
    ),
    evaluation={
        "template": f"{ANSWER_FORMAT}\n\n{_QUESTION}{_EXAMPLE}{_PROBLEM}",
        "assistant_prefix": "<reasoning>\n",
    },
    evaluation_rows=256,
    graders={PUBLIC: Grader(public_score, public_measure)},
)
