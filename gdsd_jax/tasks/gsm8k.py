r"""GSM8K: grade-school word problems whose answer is one number.

`gsm8k` rewards only the number; `gsm8k_xml` rewards tags, form and number separately. Rows come from the hub
(`openai/gsm8k`) or from a local file with the columns `question` and `answer`. The number is the text after the last
`####` of `answer` or, without `####`, the whole `answer`; commas are removed.

Rewards and metric compare numbers (`graders.numbers`). Under the grader "public", rewards compare strings, as in the
public GDSD trainer.
"""

import dataclasses
import re
from pathlib import Path

from gdsd_jax.runtime.errors import UserError
from gdsd_jax.tasks import data
from gdsd_jax.tasks.data import Row, text_of
from gdsd_jax.tasks.format import last_answer, last_boxed
from gdsd_jax.tasks.graders import numbers
from gdsd_jax.tasks.prompting import ANSWER_FORMAT
from gdsd_jax.tasks.task import PUBLIC, Grader, Task

# The character after the number belongs to the pattern: "The answer is 42." reads 42, "The answer is 42" reads 4.
_STATED = re.compile(r"The answer is (-?[0-9.,]+).")
_HASHED = re.compile(r"#### (-?[0-9.,]+)")
_INTEGER = re.compile(r"-?[0-9]+")
_NUMBER = re.compile(r"-?\$?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")
_TURN = re.compile(r"</reasoning>\s*<answer>")


def stated_number(completion: str) -> str:
    """Returns the number that the public `gsm8k` rewards, as it is written; empty if there is none.

    It is the number of the first "The answer is N.", else of the first "#### N", else the last integer with its sign.
    """
    found = _STATED.search(completion) or _HASHED.search(completion)
    return found[1] if found else next(reversed(_INTEGER.findall(completion)), "")


def score(completion: str, row: Row) -> dict[str, float]:
    """Returns 1 if the completion's number is the row's answer, however it is written, else 0."""
    return {"correct": float(numbers.equal(row["answer"], completion))}


def measure(completion: str, row: Row) -> dict[str, float]:
    """Returns the evaluation metric: 1 if the completion's number is the row's, however it is written, else 0."""
    return {"accuracy": score(completion, row)["correct"]}


def score_xml(completion: str, row: Row) -> dict[str, float]:
    """Returns 2 for the right number, and four components for the form, as large as the public trainer's."""
    return {**public_score_xml(completion, row), "correct": 2.0 * score(completion, row)["correct"]}


# ----------------------------------------------------------------------------------------------------------------------
# The public trainers' rewards and the papers' metric, number for number


def public_score(completion: str, row: Row) -> dict[str, float]:
    """Returns 1 if the number equals the row's answer as a string, else 0."""
    return {"correct": float(stated_number(completion) == row["answer"])}


def public_score_xml(completion: str, row: Row) -> dict[str, float]:
    """Returns five components, each as large as the public trainer's: tags, loose, strict, whole number, correct.

    The answer is what follows the last `<answer>` (else everything), up to `</answer>`.
    """
    answer = completion.rpartition("<answer>")[2].partition("</answer>")[0].strip()
    return {
        "tags": _tags(completion),
        "loose": 0.5 * _is_loose(completion),
        "strict": 0.5 * _is_strict(completion),
        "integer": 0.5 * answer.isdigit(),
        "correct": 2.0 * (answer == row["answer"]),
    }


def _tags(text: str) -> float:
    """Returns 0.125 for each tag that occurs once on its line, less 0.001 per character after the last two tags.

    The newline of the closing tag costs nothing. Many characters make the result negative.
    """
    value = 0.125 * (text.count("<reasoning>\n") == 1) + 0.125 * (text.count("\n</reasoning>\n") == 1)
    if text.count("\n<answer>\n") == 1:
        value += 0.125 - 0.001 * len(text.partition("\n<answer>\n")[2])
    if text.count("\n</answer>") == 1:
        value += 0.125 - 0.001 * (len(text.partition("\n</answer>")[2]) - 1)
    return value


def _is_loose(text: str) -> bool:
    """Returns whether the tags follow each other from the first character on; anything may come after them."""
    turn = _TURN.search(text, len("<reasoning>")) if text.startswith("<reasoning>") else None
    return turn is not None and text.find("</answer>", turn.end()) >= 0


def _is_strict(text: str) -> bool:
    """Returns whether each tag has its own line, with nothing before the first and one or two newlines after the last.

    No line may be missing.
    """
    opening, middle, closing = "<reasoning>\n", "\n</reasoning>\n<answer>\n", "\n</answer>\n"
    if text.endswith(closing + "\n"):
        text = text[:-1]
    turn = text.find(middle, len(opening))
    return text.startswith(opening) and text.endswith(closing) and 0 <= turn <= len(text) - len(middle) - len(closing)


def public_measure(completion: str, row: Row) -> dict[str, float]:
    r"""Returns the papers' metric: 1 if the answer equals the row's as a number, else 0.

    The answer is the last number of the last `\boxed{}`, else of the last `<answer>`, else of the text after the last
    `####`, else of the whole text; commas, a dollar sign and zeros without meaning do not count.
    """
    hashed = completion.rpartition("####")[2] if "####" in completion else None
    for text in (last_boxed(completion), last_answer(completion), hashed, completion):
        numbers = _NUMBER.findall(text or "")
        if numbers:
            return {"accuracy": float(_canonical(numbers[-1]) == _canonical(row["answer"]))}
    return {"accuracy": 0.0}


def _canonical(number: str) -> str:
    """Returns one spelling for equal numbers, without computing, since a completion may write a million digits."""
    whole, _, fraction = number.replace(",", "").replace("$", "").partition(".")
    digits = f"{whole.lstrip('-').lstrip('0')}.{fraction.rstrip('0')}"
    return f"-{digits}" if whole.startswith("-") and digits != "." else digits


def _row(place: str, record: Row) -> Row:
    data.require_columns(place, record, "question", "answer")
    solution, hashes, answer = text_of(place, record, "answer").rpartition("####")
    answer = answer.strip().replace(",", "")
    if not answer:
        raise UserError(f"{place}: there is no answer{' after ####' if hashes else ''}")
    if not _NUMBER.fullmatch(answer):
        raise UserError(f"{place}: the answer must be a number, it is {answer!r:.60}")
    # Marks such as <<48/2=24>> are notes to a calculator.
    solution = re.sub(r"<<[^<>]*>>", "", solution).strip()
    return {"question": text_of(place, record, "question").strip(), "answer": answer, "solution": solution}


def read(path: Path) -> list[Row]:
    """Reads the rows of a local file; raises UserError, naming the row, if one lacks a column or an answer."""
    return [_row(place, record) for place, record in data.read_records(path)]


def source(split: str, count: int | None, seed: int) -> list[Row]:
    """Returns rows of the public data set; the validation split is held out of its training set."""
    return data.public_rows(
        split, count, seed, _row, held_out,
        train=("openai/gsm8k", "main", "train"), test=("openai/gsm8k", "main", "test"),
    )  # fmt: skip


def held_out(row: Row) -> bool:
    """Returns `data.held_out` of the row's question, which identifies the row."""
    return data.held_out(row["question"])


_QUESTION = """Solve the problem below. Reason step by step; the answer is one number, without unit or commas{}.

Problem: {{question}}"""
_BOX = ", inside \\boxed{}"

EXAMPLES = (
    {
        "question": "A baker fills 6 trays with 8 rolls each and sells 35 of the rolls. How many rolls are left?",
        "solution": "6 trays of 8 rolls are 6 * 8 = 48 rolls.\n48 - 35 = 13 rolls are left.",
        "answer": "13",
    },
    {
        "question": "Nadia saves 15 dollars a week. After how many weeks can she pay for a bicycle of 180 dollars?",
        "solution": "Each week brings 15 dollars.\n180 / 15 = 12 weeks.",
        "answer": "12",
    },
    {
        "question": "A train has 9 cars with 40 seats each. Three quarters of the seats are taken. How many are free?",
        "solution": "There are 9 * 40 = 360 seats.\nOne quarter is free, 360 / 4 = 90 seats.",
        "answer": "90",
    },
)

_WORKING = "<reasoning>\n{solution}\n</reasoning>\n"

TASK = Task(
    name="gsm8k",
    source=source,
    read=read,
    score=score,
    measure=measure,
    weights={"correct": 1.0},
    metrics_named=("accuracy",),
    template=f"{ANSWER_FORMAT}\n\n{_QUESTION.format(_BOX)}",
    answer_template=_WORKING + "<answer>\n\\boxed{{answer}}\n</answer>",
    examples=EXAMPLES,
    graders={PUBLIC: Grader(public_score, public_measure)},
    held_out=held_out,
    evaluation={"assistant_prefix": "<reasoning>\n"},
)

TASK_XML = dataclasses.replace(
    TASK,
    name="gsm8k_xml",
    score=score_xml,
    graders={PUBLIC: Grader(public_score_xml, public_measure)},
    weights={"tags": 1.0, "loose": 1.0, "strict": 1.0, "integer": 1.0, "correct": 1.0},
    template=f"{ANSWER_FORMAT}\n\n{_QUESTION.format('')}",
    answer_template=_WORKING + "<answer>\n{answer}\n</answer>\n",
)
