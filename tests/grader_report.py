r"""The graders at large: judged answers by kind, pairs of different right answers, and ten spellings of each.

    python tests/grader_report.py judged --file answers.jsonl [--pythons PYTHON,PYTHON]
    python tests/grader_report.py pairs --data DIR [--count 2000] [--programs 0]
    python tests/grader_report.py spellings --data DIR
    python tests/grader_report.py forms --data DIR [--count 100]

`judged` counts, for each kind of answer, the rows that are judged as a person judged them (`task`, `row`, `completion`,
`right`), by both graders and by math-verify called directly in each of the given interpreters, which may hold other
versions of it. `pairs` prints every pair of different right answers that counts as equal: all pairs of MATH-500,
`--count` random ones of each other task, and `--programs` random ones of each file of programs. `spellings` ends with 1
where an answer does not equal itself. `forms` writes the reference answers of `--count` rows in the forms that models
use, and prints the share that each grader's metric calls right and its reward pays in full.
"""

import argparse
import itertools
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Kinds of right answers in mathematics, the first that matches.
KINDS = (
    ("plus-minus", r"\\pm"),
    ("conditions and words", r"\\text\{ ?if|\\text\{\(?[A-Za-z]{1,12}\)?\}$|^[A-Z]$"),
    ("matrix", r"matrix"),
    ("remainder", r"pmod"),
    ("union, interval, inequality", r"\\cup|\\infty|[<>]|\\l?g?eq?\b|\\in\b|\[|\|x"),
    ("base, subscript", r"_"),
    ("list", r"^[^()]*,(?!\\!|[0-9]{3}).*$|\\text\{ (and|or)|^\\\{"),
    ("tuple", r"^(\\left)?\(.*,"),
    ("time, ratio, ellipsis", r":|ldots"),
    ("equation", r"="),
    ("percent", r"%"),
    ("unit, money, degree", r"\\mbox|\\text|circ|\\\$"),
    ("large or tiny number", r"!|binom|\^\{-?[0-9]{2}|\^\{[0-9]|\.000|10\^"),
    ("expression", r"[a-z](?![a-z])(?<!\\p)|\\tan|\\ln"),
)


def kind(task: str, row: dict, completion: str) -> str:
    """Returns the kind of a judged row."""
    if task != "math":
        return task
    if (
        not completion.startswith("<reasoning>\nwork\n</reasoning>")
        and completion.count("boxed") + completion.count("answer") > 1
    ):
        return "math: where the answer is"
    gold = re.sub(r",\\!", "", row["answer"])
    found = next((name for name, pattern in KINDS if re.search(pattern, gold)), "number")
    return f"math: {found}"


def library(path: Path) -> None:
    """Prints the verdicts of the installed math-verify, called directly, as JSON; null for rows that it is not for."""
    from math_verify import parse, verify

    verdicts = []
    for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        verdict = None
        if record["task"] in ("math", "gsm8k"):
            gold = parse(f"\\boxed{{{record['row']['answer']}}}")
            verdict = bool(verify(gold, parse(record["completion"])))
        verdicts.append(verdict)
    print(json.dumps(verdicts))


def judged(path: Path, pythons: list[str]) -> int:
    """Prints the table of kinds; returns how many wrong answers the default grader accepts or pays in full."""
    from gdsd_jax.tasks import TASKS, audit
    from gdsd_jax.tasks.task import PUBLIC, regraded

    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    right = [record["right"] for record in records]
    columns = {"robust": [None] * len(records), "public": [None] * len(records)}
    paid = [0.0] * len(records)
    for name in dict.fromkeys(record["task"] for record in records):
        indices = [index for index, record in enumerate(records) if record["task"] == name]
        items = audit.read(path, TASKS[name])
        for grader, task in (("robust", TASKS[name]), ("public", regraded(TASKS[name], PUBLIC))):
            for index, verdict in zip(indices, audit.judge(task, items), strict=True):
                columns[grader][index] = verdict.right
                if grader == "robust":
                    paid[index] = verdict.reward
    for number, python in enumerate(pythons, start=1):
        shown = subprocess.run(
            [python, __file__, "library", "--file", path], capture_output=True, text=True, check=True
        )
        columns[f"library {number}"] = json.loads(shown.stdout.splitlines()[-1])
    kinds = [kind(record["task"], record["row"], record["completion"]) for record in records]
    print("| kind | rows |", " | ".join(f"{name} as judged (wrong accepted)" for name in columns), "|")
    print("|---|---|" + "---|" * len(columns))
    for chosen in [*sorted(set(kinds)), "all"]:
        rows = [index for index in range(len(records)) if chosen in (kinds[index], "all")]
        cells = []
        for verdicts in columns.values():
            known = [index for index in rows if verdicts[index] is not None]
            same = sum(verdicts[index] == right[index] for index in known)
            wrong = sum(verdicts[index] and not right[index] for index in known)
            cells.append(f"{same} of {len(known)} ({wrong})" if known else "")
        print(f"| {chosen} | {len(rows)} |", " | ".join(cells), "|")
    return sum(not right[i] and (columns["robust"][i] or paid[i] >= 1) for i in range(len(records)))


def golds(path: Path) -> list[str]:
    """Returns the answers of a file, as its task reads them."""
    from gdsd_jax.tasks import TASKS

    task = TASKS["math" if "math" in path.name else "gsm8k"]
    return [row["answer"] for row in task.rows("test", path=path)]


def pairs(data: Path, count: int, programs: int) -> None:
    from gdsd_jax.tasks import TASKS
    from gdsd_jax.tasks.graders import compare

    answers = golds(data / "math500_test.jsonl")
    start, checked, found = time.perf_counter(), 0, Counter()
    cache: dict[tuple[str, str], bool] = {}
    for one, other in itertools.combinations(answers, 2):
        checked += 1
        if one != other:
            for pair in ((one, other), (other, one)):
                if pair not in cache:
                    cache[pair] = compare.equal(*pair)
                found[pair] += cache[pair]
    seconds = time.perf_counter() - start
    print(f"math: {checked} pairs, {len(cache)} comparisons of different texts, {seconds:.0f} s; equal:")
    for pair, times in sorted(found.items()):
        if times:
            print(f"  {pair[0]}  answered by  {pair[1]}")
    draw = random.Random(0)
    files = {"gsm8k": "gsm8k_test.jsonl", "countdown": "countdown_cd3_test.jsonl", "sudoku": "4x4_test_sudoku.csv"}
    for name, file in files.items():
        task = TASKS[name]
        rows = task.rows("test", path=data / file)
        chosen = [draw.sample(rows, 2) for _ in range(count)]
        _crossed(name, task, chosen)
    if programs:
        for file in ("mbpp.jsonl", "HumanEval.jsonl.gz"):
            rows = TASKS["code"].rows("test", path=data / file)
            _crossed(f"code, {file}", TASKS["code"], [draw.sample(rows, 2) for _ in range(programs)])


def _crossed(name: str, task, chosen: list) -> None:
    """Prints the pairs of rows of which one's reference answer is right for the other, or paid in full."""
    completions = [f"Like this.\n{task.answer(other)}" for _, other in chosen]
    rows = [row for row, _ in chosen]
    metric = task.metrics(completions, rows)[task.metrics_named[-1]]
    equal = [index for index, value in enumerate(metric) if value == 1]
    print(f"{name}: {len(chosen)} pairs; equal: {len(equal)}")
    for index in equal:
        row, other = chosen[index]
        names = ("answer", "solution", "question", "numbers")
        shown = [next(each[name] for name in names if each.get(name)) for each in (row, other)]
        print(f"  {shown[0]!r:.90}  answered by  {shown[1]!r:.90}  target {row.get('target', '')}")


def spellings(gold: str) -> Iterable[str]:
    """Returns an answer in ten spellings, each by a rule.

    A unit is added to a plain number and left out of one that has it.
    """
    if re.fullmatch(r"[0-9.]+", gold):
        unit = f"{gold} \\text{{ cm}}"
    else:
        unit = re.sub(r"\\(?:text|mbox)\{ ?[a-z]+\}(?:\^[0-9])?|\^\\circ|\\\$", "", gold) or gold
        unit = gold if unit.startswith("\\text") or not unit.strip() else unit
    return (
        gold, f"\\boxed{{{gold}}}", f"${gold}$", f"\\({gold}\\)", gold.replace("\\frac", "\\dfrac"), f"  {gold}  ",
        f"{gold}.", unit, f"\\displaystyle {gold}", gold.replace(" ", "\\ "),
    )  # fmt: skip


def check_spellings(data: Path) -> int:
    from gdsd_jax.tasks.graders import compare, numbers

    failed = 0
    for name, rule in (
        ("math500_test.jsonl", compare.equal),
        ("gsm8k_test.jsonl", lambda gold, text: numbers.says(gold, text)),
    ):
        unequal = defaultdict(list)
        answers = golds(data / name)
        for gold in answers:
            for text in spellings(gold):
                if not rule(gold, text):
                    unequal[gold].append(text)
        failed += len(unequal)
        print(f"{name}: {len(answers)} answers in ten spellings, {sum(map(len, unequal.values()))} not equal")
        for gold, texts in unequal.items():
            print(f"  {gold}: {texts}")
    return failed


# Forms of an answer: {} is the answer, {target} Countdown's target.
_ARITHMETIC = {
    "as asked": "<answer>{}</answer>",
    "with = target": "<answer>{} = {target}</answer>",
    "target = ": "<answer>{target} = {}</answer>",
    "operators of LaTeX": "<answer>\\({latex}\\)</answer>",
    "× and ÷": "<answer>{signs}</answer>",
    "boxed in the tags": "<answer>\\boxed{{}}</answer>",
    "boxed, no tags": "\\boxed{{}}",
    "tag never closes": "<answer>{}",
    "in a sentence": "<answer>The expression is {}.</answer>",
    "no tags, with = target": "so {} = {target}",
}
_NUMBERS = {
    "as asked": "<answer>\\boxed{{}}</answer>",
    "no box": "<answer>{}</answer>",
    "no tags": "\\boxed{{}}",
    "The answer is N.": "The answer is {}.",
    "#### N and its unit": "#### {} dollars every 2 weeks",
    "unit with an exponent": "<answer>{} \\text{ ft}^2</answer>",
    "thousands": "<answer>\\boxed{{thousands}}</answer>",
    "money in a sentence": "<answer>It costs \\${} for 2 of them.</answer>",
}
_LATEX = {
    "as asked": "<answer>\\boxed{{}}</answer>",
    "no tags": "\\boxed{{}}",
    "no box": "<answer>{}</answer>",
    "period in the box": "<answer>\\boxed{{}.}</answer>",
    "dollar signs in the box": "<answer>\\boxed{${}$}</answer>",
    "a colour": "<answer>\\boxed{\\color{blue}{{}}}</answer>",
    "The answer is, in the box": "<answer>\\boxed{\\text{The answer is } {}}</answer>",
    "another box in the reasoning": "<reasoning>\\boxed{7777}</reasoning><answer>{}</answer>",
}
_FORMS = {
    "countdown": ("countdown_cd3_test.jsonl", _ARITHMETIC),
    "gsm8k": ("gsm8k_test.jsonl", _NUMBERS),
    "math": ("math500_test.jsonl", _LATEX),
}


def forms(data: Path, count: int) -> None:
    from gdsd_jax.tasks import TASKS, audit
    from gdsd_jax.tasks.task import PUBLIC, regraded

    print("| task | form | robust metric | robust reward | public metric | public reward |")
    print("|---|---|---:|---:|---:|---:|")
    for name, (file, patterns) in _FORMS.items():
        task = TASKS[name]
        rows = task.rows("test", path=data / file, count=count)
        if name == "gsm8k":
            rows = [{**row, "answer": str(1000 + int(row["answer"]) % 9000)} for row in rows]
        for form, pattern in patterns.items():
            items = [audit.Item("", _written(pattern, task.reference(row)), row, None) for row in rows]
            cells = []
            for graded in (task, regraded(task, PUBLIC)):
                verdicts = audit.judge(graded, items)
                cells += [sum(v.right for v in verdicts), sum(v.reward >= 1 for v in verdicts)]
            print(
                f"| {name} | {form} |", " | ".join(f"{100 * cell / len(rows):.0f} %" for cell in cells), "|", flush=True
            )


def _written(pattern: str, row: dict) -> str:
    answer = row.get("expression") or row["answer"]
    latex = answer.replace("*", " \\times ").replace("/", " \\div ")
    fields = {
        "{latex}": latex, "{signs}": answer.replace("*", "×").replace("/", "÷"), "{target}": str(row.get("target")),
        "{thousands}": f"{int(answer):,}".replace(",", "{,}") if answer.isdigit() else answer, "{}": answer,
    }  # fmt: skip
    text = pattern
    for field, value in fields.items():
        text = text.replace(field, value)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("judged", "pairs", "spellings", "forms", "library"))
    parser.add_argument("--file", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--pythons", default="")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--programs", type=int, default=0)
    flags = parser.parse_args()
    if flags.what == "library":
        library(flags.file)
    elif flags.what == "judged":
        sys.exit(judged(flags.file, list(filter(None, flags.pythons.split(",")))) > 0)
    elif flags.what == "forms":
        forms(flags.data, min(flags.count, 100))
    elif flags.what == "pairs":
        pairs(flags.data, flags.count, flags.programs)
    else:
        sys.exit(check_spellings(flags.data) > 0)


if __name__ == "__main__":
    main()
