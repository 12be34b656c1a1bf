"""Compares both graders of a task on completions: what each calls right, what training would pay, where they differ.

    python -m gdsd_jax.tasks.audit --task math --file runs/math/evaluation/evaluation.jsonl
    python -m gdsd_jax.tasks.audit --task gsm8k --file completions.jsonl --all --limit 500

Prints for each grader whether the answer is right (the task's last metric) and what training pays for it, as a share of
the reward for a right answer in the right form.

FILE holds JSON objects, one per line or in one array. Each has `completion` and the fields of its row, as `evaluate`
writes them, or the row as an object under `row`. Objects that name another `task` are left out; those that name none
count. If objects have `right`, the judgement of a person, each grader is also compared with it.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gdsd_jax.runtime import front
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.tasks import TASKS, code, resolve
from gdsd_jax.tasks.data import Row, column, read_records
from gdsd_jax.tasks.graders import extract
from gdsd_jax.tasks.task import PUBLIC, ROBUST, Task, regraded


class Item(NamedTuple):
    """One completion: its place in the file, its row, and whether a person called it right (None if unjudged)."""

    place: str
    completion: str
    row: Row
    right: bool | None


class Verdict(NamedTuple):
    """A grader's verdict on one completion: the task's last metric, and the reward as a share of the full reward."""

    metric: float
    reward: float

    @property
    def right(self) -> bool:
        return self.metric == 1.0


def read(path: Path, task: Task) -> list[Item]:
    """Returns the task's completions in a file; raises UserError if it has none."""
    items = []
    for place, record in read_records(path):
        if record.get("task") not in (None, task.name):
            continue
        row = column(place, record, "row") if "row" in record else record
        if not isinstance(row, dict):
            raise UserError(f"{place}: row must be an object")
        if task.name.startswith("code") and "tests" not in row:
            row = code.to_row(place, row)
        completion = str(column(place, record, "completion"))
        right = record.get("right")
        items.append(Item(place.rpartition(", ")[2], completion, row, right if isinstance(right, bool) else None))
    if not items:
        raise UserError(f"{path} has no completion of the task {task.name}: change --task or --file")
    return items


def judge(task: Task, items: Sequence[Item]) -> list[Verdict]:
    """Returns the verdicts of the task's grader."""
    completions, rows = [item.completion for item in items], [item.row for item in items]
    metric = np.nan_to_num(task.metrics(completions, rows)[task.metrics_named[-1]])
    reward = task.reward(completions, rows) / full_reward(task)
    return [Verdict(float(one), float(other)) for one, other in zip(metric, reward, strict=True)]


def full_reward(task: Task) -> float:
    """Returns the reward for a right answer in the right form, which is the reward of the task's own worked example."""
    example = task.examples[0]
    answer = task.answer(example)
    return float(task.reward([f"It is so.\n{answer}" if task.name.startswith("code") else answer], [example])[0]) or 1.0


def differing(robust: Verdict, public: Verdict) -> bool:
    """Returns whether the graders differ on what is right, or the public reward pays in full for what is wrong."""
    return robust.right != public.right or (public.reward >= 1 and not robust.right)


def report(
    items: Sequence[Item], robust: Sequence[Verdict], public: Sequence[Verdict], *, show_all: bool, limit: int
) -> str:
    """Returns the lines of the report: first the completions, then the counts."""
    chosen = [index for index in range(len(items)) if show_all or differing(robust[index], public[index])]
    place = max([len("place"), *(len(items[index].place) for index in chosen[:limit])])
    lines = [f"{'':{place}}  robust       public", f"{'place':>{place}}  right  paid  right  paid  answer"]
    width = shutil.get_terminal_size((120, 24)).columns - len(lines[1]) + len("answer")
    for index in chosen[:limit]:
        figures = "  ".join(f"{one.metric:5.2f} {one.reward:5.2f}" for one in (robust[index], public[index]))
        lines.append(f"{items[index].place:>{place}}  {figures}  {_shown(items[index], max(width, 30))}")
    if len(chosen) > limit:
        lines.append(f"... and {len(chosen) - limit} more: raise --limit")
    count = len(items)
    wrong_paid = sum(two.reward >= 1 and not one.right for one, two in zip(robust, public, strict=True))
    lines += [
        "",
        f"{count} completions; right: robust {_count(robust)}, public {_count(public)}; "
        f"the graders differ on {sum(map(differing, robust, public))}",
        f"the public reward pays in full for {wrong_paid} that the robust grader calls wrong",
    ]
    judged = [index for index, item in enumerate(items) if item.right is not None]
    for name, verdicts in ((ROBUST, robust), (PUBLIC, public)) if judged else ():
        agreed = sum(verdicts[index].right == items[index].right for index in judged)
        wrong = [verdicts[index] for index in judged if not items[index].right]
        accepted, paid = sum(one.right for one in wrong), sum(one.reward >= 1 for one in wrong)
        lines.append(
            f"{name}: {agreed} of {len(judged)} as judged; "
            f"of {len(wrong)} wrong ones {accepted} accepted, {paid} paid in full"
        )
    return "\n".join(lines)


def _count(verdicts: Sequence[Verdict]) -> int:
    return sum(verdict.right for verdict in verdicts)


def _shown(item: Item, width: int) -> str:
    """Returns the answer and, where the row has one, the right answer, on one line of this many characters at most."""
    gold = str(item.row.get("answer", item.row.get("target", item.row.get("solution", ""))))
    text = " ".join(extract.scope(item.completion).split())
    frame = len(" (right: )") if gold else 0
    gold = gold and f" (right: {_cut(gold, max(width // 3, width - len(text)) - frame)})"
    return _cut(text, width - len(gold), end=False) + gold


def _cut(text: str, width: int, end: bool = True) -> str:
    """Returns the text with its end, or its beginning, replaced by dots if it is longer than `width`."""
    if len(text) <= width:
        return text
    return text[: width - 3] + "..." if end else "..." + text[3 - width :]


def audit(name: str, path: Path, **settings: Any) -> str:
    """Returns the report on a file.

    Raises UserError if the task has only one grader, the file is not in the required form, or the limit is negative.
    """
    task = resolve(name)
    public = regraded(task, PUBLIC)
    if settings["limit"] < 0:
        raise UserError(f"--limit {settings['limit']} must be at least 0")
    items = read(path, task)
    return report(items, judge(task, items), judge(public, items), **settings)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, help=f"one of {', '.join(TASKS)}, or package.module:NAME")
    parser.add_argument("--file", type=Path, required=True, help="completions with their rows")
    parser.add_argument("--all", action="store_true", help="print every completion, not only where the graders differ")
    parser.add_argument("--limit", type=int, default=50, help="completions to print")
    flags = parser.parse_args(arguments)
    print(audit(flags.task, flags.file, show_all=flags.all, limit=flags.limit))


if __name__ == "__main__":
    front.run(main)
