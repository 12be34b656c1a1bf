r"""MATH: competition problems whose answer is an expression in LaTeX, inside `\boxed{}`.

`math` rewards a right answer, `math_xml` also its form. An answer is right if `graders.compare` finds it equal: answers
are read by type and compared exactly. The grader "public" pays what the public trainers pay: `math` for equivalence
decided by `math-verify`, `math_xml` for the same string after normalisation.

Rows come from the hub (training: `ankner/math-500`, test: `HuggingFaceH4/MATH-500`) or from a local file with the
column `problem` (or `question`) and `answer`, `solution` or both; without `answer` it is the last box of `solution`.

A completion may be expensive to judge; it may keep math-verify busy forever or end its process. So all scores run in
worker processes (`workers`). An answer that cannot be judged within the limits is worth nothing.
"""

import dataclasses
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from gdsd_jax.runtime.errors import UserError
from gdsd_jax.tasks import data
from gdsd_jax.tasks.data import Row, text_of
from gdsd_jax.tasks.format import first_answer, last_answer, last_boxed
from gdsd_jax.tasks.prompting import ANSWER_FORMAT
from gdsd_jax.tasks.task import PUBLIC, Grader, Task
from gdsd_jax.tasks.workers import Limits

LIMITS = Limits(seconds=5.0, megabytes=1024, imports=("gdsd_jax.tasks.graders.compare",))
PUBLIC_LIMITS = Limits(seconds=5.0, megabytes=1024, imports=("math_verify",))
# math-verify's own limits are off: they use wall-clock time, on which no score may depend, and the worker has limits.
NO_LIMIT = 0
# Answers are at the end, and math-verify may take quadratic time in the text before them.
MAX_TEXT = 4_000


def right(completion: str, row: Row) -> bool:
    """Returns whether the completion's answer, found by its format, equals the row's answer."""
    # Imported late, because only workers need the arithmetic.
    from gdsd_jax.tasks.graders import compare, extract

    found = extract.answer(completion)
    gold = row["answer"]
    wanted = extract.boxes(gold) if "\\boxed" in gold else gold
    return found is not None and bool(wanted) and compare.equal(wanted, found)


def score(completion: str, row: Row) -> dict[str, float]:
    """Returns 2 if the completion's answer is right, else 0."""
    return {"correct": 2.0 * right(completion, row)}


def measure(completion: str, row: Row) -> dict[str, float]:
    """Returns the evaluation metric: 1 if the completion's answer is right, else 0."""
    return {"accuracy": float(right(completion, row))}


def score_xml(completion: str, row: Row) -> dict[str, float]:
    r"""Returns 2 for a right answer; for the form, 0.5 for `<answer>` (else 0) plus 0.5 for `\boxed` (else 0.25)."""
    return {**score(completion, row), **_form(completion)}


def _form(completion: str) -> dict[str, float]:
    tags, box = 1.0 if "<answer>" in completion else 0.0, 1.0 if "\\boxed" in completion else 0.5
    return {"format": tags / 2 + box / 2}


# ----------------------------------------------------------------------------------------------------------------------
# The public trainers' rewards and the papers' metric, number for number


def equivalent(response: str, answer: str) -> bool:
    r"""Returns whether math-verify finds the response's answer equal to `answer`.

    `answer` is LaTeX or a text with a box.
    """
    # Imported late: SymPy takes a second to import, and only workers need it.
    import sympy.core.random
    from math_verify import parse, verify

    # SymPy tests equality at random points; the seed makes them the same for the same answer.
    sympy.core.random.seed(0)
    found = parse(response[-MAX_TEXT:], parsing_timeout=NO_LIMIT)
    # In the order of the public trainer, which matters for assignments.
    return verify(_sets(found), _gold(answer), timeout_seconds=NO_LIMIT)


@lru_cache(maxsize=256)
def _gold(answer: str) -> list[Any]:
    from math_verify import parse

    return _sets(parse(answer if "\\boxed" in answer else f"\\boxed{{{answer}}}", parsing_timeout=NO_LIMIT))


def _sets(expressions: list[Any]) -> list[Any]:
    r"""Returns the S of every `x \in S`.

    math-verify reads `x \in S` as the equation x = S and finds it equal to any other such equation.
    """
    import sympy

    membership = [isinstance(e, sympy.Eq) and isinstance(e.rhs, sympy.Set) for e in expressions]
    return [e.rhs if is_in_set else e for e, is_in_set in zip(expressions, membership, strict=True)]


def public_score(completion: str, row: Row) -> dict[str, float]:
    """Returns 2 if math-verify finds the completion's answer equivalent to the row's, else 0."""
    return {"correct": 2.0 * equivalent(completion, row["answer"])}


def public_score_xml(completion: str, row: Row) -> dict[str, float]:
    r"""Returns 2 for the same string after normalisation; form as in `score_xml`.

    The last box of the first complete `<answer>`, else of the whole text, is compared; a text without a box counts as
    it is. If a box never closes there is no answer, and nothing equals it; the public trainer rewards two such boxes as
    equal.
    """
    answer = first_answer(completion)
    text = completion if answer is None else answer
    return {"correct": 2.0 * same(text, row["answer"]), **_form(completion)}


def public_measure(completion: str, row: Row) -> dict[str, float]:
    """Returns 1 if the last `<answer>`, else the whole text, is the same string or equivalent, else 0."""
    answer = last_answer(completion)
    text = completion if answer is None else answer
    return {"accuracy": float(same(text, row["answer"]) or equivalent(text, row["answer"]))}


def same(response: str, answer: str) -> bool:
    """Returns whether the boxes of both are the same string after normalisation."""
    found, wanted = boxed(response), boxed(answer)
    return found is not None and wanted is not None and normalise(found) == normalise(wanted)


def boxed(text: str) -> str | None:
    r"""Returns the last `\boxed{...}` or `\boxed ...$`.

    If the text has no box, the result is the text itself; if a box never closes, the result is None.
    """
    if "\\boxed " in text:
        return text.rpartition("\\boxed ")[2].partition("$")[0]
    return last_boxed(text) if "\\boxed" in text else text


# Differences in spelling without meaning, in the order in which they are replaced.
_SPELLINGS = (
    ("\n", ""),
    ("\\!", ""),
    ("\\\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    ("\\left", ""),
    ("\\right", ""),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("\\$", ""),
)
_POINTS = (("\\%", ""), (" .", " 0."), ("{.", "{0."))


def normalise(latex: str) -> str:
    r"""Returns one spelling for answers that differ in layout, units, brackets of `\frac` and `\sqrt`, or `x =`.

    Follows the equality test that comes with the MATH data set (Hendrycks et al. 2021, arXiv 2103.03874).
    """
    for spelling, replacement in _SPELLINGS:
        latex = latex.replace(spelling, replacement)
    latex = latex.partition("\\text{ ")[0]
    for spelling, replacement in _POINTS:
        latex = latex.replace(spelling, replacement)
    if latex.startswith("."):
        latex = f"0{latex}"
    left, equals, right = latex.partition("=")
    if equals and "=" not in right and len(left) <= 2:
        latex = right
    latex = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", latex).replace(" ", "")
    latex = re.sub(r"\\frac([^{])([^{])", r"\\frac{\1}{\2}", latex)
    latex = re.sub(r"\\frac([^{])\{", r"\\frac{\1}{", latex)
    if latex == "0.5":
        return "\\frac{1}{2}"
    return re.sub(r"\A(-?(?:0|[1-9][0-9]*))/(-?(?:0|[1-9][0-9]*))\Z", r"\\frac{\1}{\2}", latex)


def _row(place: str, record: Row) -> Row:
    solution = text_of(place, record, "solution").strip() if record.get("solution") else ""
    answer = record.get("answer")
    answer = last_boxed(text_of(place, record, "solution")) if answer is None else text_of(place, record, "answer")
    if answer is None or not answer.strip():
        raise UserError(f"{place}: there is no answer, neither as answer nor as the last \\boxed{{}} of solution")
    question = text_of(place, record, "problem", "question").strip()
    return {"question": question, "answer": answer.strip(), "solution": solution}


def read(path: Path) -> list[Row]:
    """Reads the rows of a local file; raises UserError, naming the row, if one lacks a column or an answer."""
    return [_row(place, record) for place, record in data.read_records(path)]


def source(split: str, count: int | None, seed: int) -> list[Row]:
    """Returns rows of the public data sets; the validation split is held out of the training set."""
    return data.public_rows(
        split, count, seed, _row, held_out,
        train=("ankner/math-500", None, "train"), test=("HuggingFaceH4/MATH-500", None, "test"),
    )  # fmt: skip


def held_out(row: Row) -> bool:
    """Returns `data.held_out` of the row's question, which identifies the row."""
    return data.held_out(row["question"])


_QUESTION = r"""Solve the problem below. Reason step by step and write the final answer in LaTeX inside \boxed{}.

Problem: {question}"""

EXAMPLES = (
    {
        "question": "What is the sum of the solutions of $x^2 - 7x + 10 = 0$?",
        "solution": "The equation factors as $(x - 2)(x - 5) = 0$, so $x$ is 2 or 5, and $2 + 5 = 7$.",
        "answer": "7",
    },
    {
        "question": "A fair die is rolled twice. What is the probability that both rolls are even?",
        "solution": "Each roll is even with probability $\\frac{1}{2}$, and the rolls are independent.",
        "answer": "\\frac{1}{4}",
    },
    {
        "question": "Find the distance between the points $(1, 2)$ and $(4, 5)$ in simplest radical form.",
        "solution": "It is $\\sqrt{3^2 + 3^2} = \\sqrt{18}$, and $18 = 9 \\cdot 2$.",
        "answer": "3\\sqrt{2}",
    },
)

TASK = Task(
    name="math",
    source=source,
    read=read,
    score=score,
    measure=measure,
    weights={"correct": 1.0},
    metrics_named=("accuracy",),
    template=f"{ANSWER_FORMAT}\n\n{_QUESTION}",
    answer_template="<reasoning>\n{solution}\n</reasoning>\n<answer>\n\\boxed{{answer}}\n</answer>",
    examples=EXAMPLES,
    limits=LIMITS,
    graders={PUBLIC: Grader(public_score, public_measure, PUBLIC_LIMITS)},
    held_out=held_out,
    evaluation={"assistant_prefix": "<reasoning>\n"},
)

TASK_XML = dataclasses.replace(
    TASK,
    name="math_xml",
    score=score_xml,
    weights={"correct": 1.0, "format": 1.0},
    graders={PUBLIC: Grader(public_score_xml, public_measure, PUBLIC_LIMITS)},
)
