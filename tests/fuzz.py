"""Malformed answers without end, for the scores of every task: no exception, no item over its limit, bounded memory.

And no reward above the metric: what the metric calls wrong is never paid for (`PAID`), under the default grader.

    python tests/fuzz.py --count 100000 [--tasks sudoku,math] [--seed 0]
    python tests/fuzz.py --tasks code --count 100000 --programs 2000

Seven in eight answers come from a grammar of what goes wrong (`malformed`), the others from hypothesis. The grammar
takes the task's own right answer apart, nests tags and braces, leaves them open, writes digits of other scripts, huge
numbers and towers of powers, and lines of 100 kB. Prints a line per task and ends with 1 where one of them fails.

Programs of the code task are found and put together as in training, but their tests pass or fail by a hash of the
program (`verdicts_without_running`): the relation of reward and metric does not depend on how a program does. Beside
it, the first `--programs` different ones that parse run in the sandbox. A line of their own says how many of them there
were, how often each verdict was given, and the wall clock of the longest.

Another task needs one entry in `CASES`; `malformed(random, case)` and `strategy(case)` make answers for any other test.
"""

import argparse
import collections
import contextlib
import json
import math
import os
import random
import resource
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gdsd_jax.tasks import TASKS, Task, code, sandbox, workers

# Processor time of a score that runs in this process. Those in workers have the limit of their task.
SECONDS = 1.0
LONG = 100_000


class Case(NamedTuple):
    """What the grammar works on: a row of the task, an answer with full marks, its language in pieces, its frames."""

    row: dict
    right: str
    pieces: tuple[str, ...]
    frames: tuple[str, ...] = ("{}", "<answer>{}</answer>", "<answer>\n{}\n</answer>", "<answer>\\boxed{{{}}}</answer>")


_TAGS = ("<answer>", "</answer>", "<answer", "<reasoning>", "</reasoning>\n", "\n<answer>\n", "\n</answer>\n")
_COMMON = (*_TAGS, "\\boxed{", "{", "}", "(", ")", "[", "]", "$", "\n", "\r", "\t", " ", "\0", "\ud800", "\u202e", "=")
_DIGITS = ("0", "7", "42", "٣", "²", "½", "Ⅷ", "７", "१२", "1e9", "-", "+", ".", ",", "_", "%", "∞")
_LATEX = (
    "\\frac", "\\sqrt", "\\left(", "\\right)", "\\text{ cm}", "\\pi", "^", "_", "\\cdot", "\\infty", "\\cup", "x", "!",
    "\\begin{pmatrix}", "\\end{pmatrix}", "&", "\\\\", "\\int", "\\sum_{n=1}^{9}", "\\log", "\\dfrac12", "\\boxed 3$",
    "\\{", "\\}", "\\le", "\\in", "\\%", "^\\circ", "\\overline{3}", "\\binom{9}{3}",
)  # fmt: skip
_NUMBER_TEXT = ("The answer is ", "#### ", "The answer is 42.", "$", "1,234")
_WORD_PROBLEM = {"question": "How many?", "answer": "42", "solution": "6 * 7 is 42."}
_FRACTION = {"question": "How much?", "answer": "\\frac{1}{2}", "solution": "Half of it."}
_FRACTION_RIGHT = "<reasoning>\nHalf of it.\n</reasoning>\n<answer>\n\\boxed{\\frac{1}{2}}\n</answer>"

CASES = {
    "sudoku": Case(
        {"puzzle": "1000040000300002", "solution": "1243341221344321"},
        "<reasoning>\nRow by row.\n</reasoning>\n<answer>\n1243341221344321\n</answer>",
        ("1243341221344321", "1243", "Row 1: "),
    ),
    "countdown": Case(
        {"numbers": [3, 5, 7], "target": 22},
        "<reasoning>\n15 and 7.\n</reasoning>\n<answer>\n3*5+7\n</answer>",
        ("3", "5", "7", "*", "/", "**", "//", "3*5+7", "\\times", "\\div", "= 22", "()"),
    ),
    "gsm8k": Case(
        _WORD_PROBLEM, "<reasoning>\n6 * 7\n</reasoning>\n<answer>\n\\boxed{42}\n</answer>", _NUMBER_TEXT
    ),
    "gsm8k_xml": Case(_WORD_PROBLEM, "<reasoning>\n6 * 7\n</reasoning>\n<answer>\n42\n</answer>\n", _NUMBER_TEXT),
    "math": Case(_FRACTION, _FRACTION_RIGHT, _LATEX),
    "math_xml": Case(_FRACTION, _FRACTION_RIGHT, _LATEX),
}  # fmt: skip
# The component that pays for a right answer, its full value, the metric, and what a wrong answer may have of it.
PAID = {
    "sudoku": ("cells_correct", 1.0, "cells", 0.0),
    "countdown": ("equation", 1.0, "accuracy", 0.1),
    "gsm8k": ("correct", 1.0, "accuracy", 0.0),
    "gsm8k_xml": ("correct", 2.0, "accuracy", 0.0),
    "math": ("correct", 2.0, "accuracy", 0.0),
    "math_xml": ("correct", 2.0, "accuracy", 0.0),
    "code": ("tests", 1.0, "passed", 0.5),  # one of the two tests
}
_PROGRAM = (
    "```", "```python\n", "\ndef up(x):\n    return x + 1\n", "\ndef up(x):\n    ", "return ", "up(", "f'{", "\"\"\"",
    "\nwhile True:\n    ", "pass\n", "\nif x:\n", "#", "await ", "lambda:", "\nx = [0] * 9**9\n", "\ndel up\n",
    "\nimport os\nos.fork()\n", "\nimport sys\nsys.exit(0)\n", "\nimport os\nos._exit(0)\n", "\nprint('x' * 10**7)\n",
    "\nclass A:\n    __eq__ = lambda self, other: True\n", "\nraise KeyboardInterrupt\n", "\nup = A()\n",
    "\nopen('/tmp/x', 'w').write('x' * 10**8)\n",
)  # fmt: skip
CODE = Case(
    {"tests": ["assert up(1) == 2", "assert up(2) == 3"], "setup": "", "shadowed": []},
    "Add one.\n```python\ndef up(x):\n    return x + 1\n```",
    _PROGRAM,
    ("{}", "```python\n{}\n```", "Add one.\n```python\n{}\n```"),
)


class _Counting(workers.Workers):
    """Workers that keep the longest processor time of an item and how many were ended at a limit."""

    slowest, lost = 0.0, 0

    def map(self, function: workers.Score, items: Iterable[tuple]) -> list[workers.Outcome]:
        outcomes = super().map(function, items)
        self.slowest = max(self.slowest, *(outcome.seconds for outcome in outcomes))
        self.lost += sum(outcome.lost for outcome in outcomes)
        return outcomes


@contextlib.contextmanager
def verdicts_without_running(pool: workers.Workers) -> Iterator[dict[sandbox.Program, None]]:
    """Gives each test of a program a verdict by a hash, and finds programs in `pool`; yields the programs judged."""
    programs: dict[sandbox.Program, None] = {}

    def judge(judged: list[sandbox.Program], backend: str | None = None) -> list[list[sandbox.Verdict]]:
        programs.update(dict.fromkeys(judged))
        return [[_verdict(program, test) for test in program.tests] for program in judged]

    with mock.patch.object(sandbox, "judge", judge), mock.patch.object(workers, "shared", lambda limits: pool):
        yield programs
    code._share.cache_clear()


def _verdict(program: sandbox.Program, test: str) -> sandbox.Verdict:
    digest = zlib.crc32(f"{program.source}{test}".encode(errors="surrogatepass"))
    return sandbox.Verdict.PASSED if digest % 3 else sandbox.Verdict.FAILED


def run_code(count: int, seed: int = 0) -> tuple["Report", dict[sandbox.Program, None]]:
    """Scores and measures `count` answers of the code task; returns the programs that were found too."""
    code._share.cache_clear()
    pool = _Counting(code.LOCATING)
    with verdicts_without_running(pool) as programs:
        report = run(code.TASK, CODE, count, seed)
    pool.close()
    megabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return report._replace(lost=pool.lost, slowest=max(pool.slowest, report.slowest), megabytes=megabytes), programs


def malformed(draw: random.Random, case: Case) -> str:
    """One answer; most often inside answer tags."""
    pieces = (*_COMMON, *_DIGITS, *case.pieces, *case.pieces)
    kind = draw.choices(("soup", "damaged", "nested", "number", "tower", "long"), (38, 45, 6, 6, 3, 2))[0]
    if kind == "damaged":
        return _damaged(draw, case.right, pieces)
    text = {"soup": _soup, "nested": _nested, "number": _number, "tower": _tower, "long": _long}[kind](draw, pieces)
    return draw.choice(case.frames).format(text)


def _soup(draw: random.Random, pieces: tuple[str, ...]) -> str:
    return "".join(draw.choices(pieces, k=draw.randint(0, 30)))


def _damaged(draw: random.Random, right: str, pieces: tuple[str, ...]) -> str:
    """The right answer with a few characters gone, doubled, exchanged or followed by a piece, or cut short."""
    for _ in range(draw.randint(1, 4)):
        start = draw.randint(0, len(right))
        end = min(len(right), start + draw.randint(0, 5))
        middle = draw.choice(("", right[start:end] * 2, draw.choice(pieces)))
        right = right[:start] + middle + right[end:]
    return right[: draw.randint(0, len(right))] if draw.random() < 0.2 else right


def _nested(draw: random.Random, pieces: tuple[str, ...]) -> str:
    """One opening many times, its closing as often, once more, once less or never."""
    pairs = (("(", ")"), ("{", "}"), ("\\boxed{", "}"), ("<answer>", "</answer>"), ("[", "]"), ("\\sqrt{", "}"))
    opening, closing = draw.choice((*pairs, ("-", ""), ("\\frac{1}{1+", "}"), ("```python\n", "```"), ("$", "$")))
    depth = draw.choice((2, 10, 100, 1000, 3000))
    return opening * depth + _soup(draw, pieces) + closing * draw.choice((depth, depth + 1, depth - 1, 0))


def _number(draw: random.Random, pieces: tuple[str, ...]) -> str:
    digits = draw.choice(("0123456789", "٠١٢٣٤٥٦٧٨٩", "²³¹", "０１２３"))
    text = "".join(draw.choices(digits, k=draw.choice((1, 20, 400, 5000, 20_000))))
    return draw.choice(("{}", "-{}", "0.{}", "{}.", "1/{}", "{}/1", "1e{}", "{},000", "{}%")).format(text)


def _tower(draw: random.Random, pieces: tuple[str, ...]) -> str:
    """Few characters that are much to compute."""
    base, height = draw.choice(("9", "99", "x", "0.5", "-1", "(x+y)")), draw.randint(1, 6)
    power = draw.choice(("{}**{}", "{}^{{{}}}", "({})!{}", "\\binom{{{}}}{{{}}}", "\\frac{{{}}}{{{}}}", "{}^{}"))
    text = base
    for _ in range(height):
        text = power.format(base, text)
    return text


def _long(draw: random.Random, pieces: tuple[str, ...]) -> str:
    piece = draw.choice((*pieces, _soup(draw, pieces) or "x"))
    return piece * (LONG // len(piece))


def strategy(case: Case) -> st.SearchStrategy[str]:
    """Answers of the grammar and any text, for hypothesis."""
    grown = st.integers(0, 2**32).map(lambda seed: malformed(random.Random(seed), case))
    return st.one_of(grown, grown, st.text(), st.text().map("<answer>{}</answer>".format))


def answers(case: Case, count: int, seed: int) -> Iterator[str]:
    """`count` answers, every eighth from hypothesis."""
    texts: list[str] = []

    @settings(max_examples=-(-count // 8), database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck), derandomize=True)  # fmt: skip
    @given(st.one_of(st.text(), st.text().map("<answer>{}</answer>".format)))
    def collect(text: str) -> None:
        texts.append(text)

    collect()
    draw = random.Random(seed)
    for index in range(count):
        yield texts[index // 8 % len(texts)] if index % 8 == 0 else malformed(draw, case)


class Report(NamedTuple):
    """Figures of one task. `lost` counts items that were ended at a limit, `over` those that took longer than theirs;
    `failures` is what raised or gave no finite number. Seconds of items are processor time."""

    task: str
    answers: int
    lost: int
    over: int
    slowest: float
    seconds: float
    megabytes: float
    failures: list[str]


def overpaid(name: str, rewards: Mapping[str, float], metrics: Mapping[str, float]) -> bool:
    """Whether a reward is above what the metric says."""
    if name not in PAID:
        return False
    component, full, metric, shaping = PAID[name]
    return rewards[component] / full > max(metrics[metric], shaping) + 1e-6


def run(task: Task, case: Case, count: int, seed: int = 0, batch: int = 1000) -> Report:
    """Scores and measures `count` answers; nothing is kept but the failures."""
    start, slowest, lost, over, failures = time.perf_counter(), 0.0, 0, 0, []
    pool = None if task.limits is None else workers.Workers(task.limits)
    limit = SECONDS if pool is None else task.limits.seconds + workers.GRACE
    stream = answers(case, count, seed)
    for first in range(0, count, batch):
        items = [(next(stream), case.row) for _ in range(first, min(first + batch, count))]
        found = []
        for function, names in ((task.score, task.weights), (task.measure, task.metrics_named)):
            outcomes = [_here(function, item) for item in items] if pool is None else pool.map(function, items)
            found.append(outcomes)
            for (text, _), outcome in zip(items, outcomes, strict=True):
                slowest, lost = max(slowest, outcome.seconds), lost + outcome.lost
                over += outcome.seconds > limit
                finite = outcome.values is not None and all(math.isfinite(outcome.values[name]) for name in names)
                if not finite and not outcome.lost:
                    failures.append(f"{outcome.error or outcome.values}: {text!r:.200}")
        for (text, _), reward, metric in zip(items, *found, strict=True):
            # An item that was lost earns 0, and so it may where the metric was lost.
            measured = metric.values or dict.fromkeys(task.metrics_named, 0.0)
            if reward.values and overpaid(task.name, reward.values, measured):
                failures.append(f"paid {reward.values} for {metric.values}: {text!r:.200}")
    if pool is not None:
        pool.close()
    who = resource.RUSAGE_SELF if pool is None else resource.RUSAGE_CHILDREN
    megabytes = resource.getrusage(who).ru_maxrss / 1024
    return Report(task.name, count, lost, over, slowest, time.perf_counter() - start, megabytes, failures)


def run_programs(programs: Iterable[sandbox.Program], count: int) -> dict:
    """Runs the first `count` programs that parse in the sandbox, and checks that all tests have a verdict each time."""

    def judged(program: sandbox.Program) -> tuple[float, list[sandbox.Verdict]]:
        start = time.perf_counter()
        (verdicts,) = sandbox.judge([program])
        return time.perf_counter() - start, verdicts

    sandbox.find()
    start = time.perf_counter()
    pool = workers.shared(code.LOCATING)
    different = list(programs)
    parsed = pool.map(code.parse, [(program.source,) for program in different])
    parsing = [program for program, outcome in zip(different, parsed, strict=True) if outcome.values == {"parses": 1.0}]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        found = list(threads.map(judged, parsing[:count]))
    counts = collections.Counter(verdict.name for _, verdicts in found for verdict in verdicts)
    return {
        "different": len(different),
        "parsing": len(parsing),
        "programs": len(found),
        "verdicts": dict(counts),
        "failures": sum(len(verdicts) != len(CODE.row["tests"]) for _, verdicts in found) + counts["REFUSED"],
        "slowest": max((seconds for seconds, _ in found), default=0.0),
        "seconds": time.perf_counter() - start,
        "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _here(function: workers.Score, item: tuple) -> workers.Outcome:
    start = time.thread_time()
    values = dict(function(*item))  # an exception ends the run: the traceback is what one wants to see
    return workers.Outcome(values, seconds=time.thread_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="answers per task")
    parser.add_argument("--tasks", default=",".join([*CASES, "code"]))
    parser.add_argument("--programs", type=int, default=0, help="programs of the code task that run in the sandbox")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    failed = False
    for name in flags.tasks.split(","):
        if name == "code":
            report, programs = run_code(flags.count, flags.seed)
        else:
            report, programs = run(TASKS[name], CASES[name], flags.count, flags.seed), {}
        failed |= report.over > 0 or bool(report.failures)
        print(
            json.dumps({**report._asdict(), "failures": len(report.failures)}),
            *report.failures[:5],
            sep="\n  ",
            flush=True,
        )
        if programs and flags.programs:
            found = run_programs(programs, flags.programs)
            failed |= found["failures"] > 0
            print(json.dumps(found), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
