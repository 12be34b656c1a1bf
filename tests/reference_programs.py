"""Reference solutions of HumanEval and MBPP through the sandbox, and the same made wrong; programs per second.

    python tests/reference_programs.py DIRECTORY [--backend bwrap|unshare] [--seconds 1] [--processes N] [--count N]
    python tests/reference_programs.py --trivial 200 [--backend bwrap|unshare] [--processes N]

DIRECTORY holds HumanEval.jsonl.gz and mbpp.jsonl. Every reference program must pass all tests, and fail some once each
of its functions returns a fixed text instead; rows that do otherwise are named with their verdicts. `--trivial` judges
that many one-line programs with one test each. Time is wall clock, so the load of the machine is printed beside it. The
exit code is 1 if a row or a one-line program did otherwise.
"""

import argparse
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gdsd_jax.tasks import code, sandbox
from gdsd_jax.tasks.sandbox import Limits, Program, Verdict

FILES = ("HumanEval.jsonl.gz", "mbpp.jsonl")


def altered(program: str) -> str:
    """The program with every function of its own returning a fixed text."""
    lines = [f"{name} = lambda *arguments, **named: 'altered'" for name in sorted(code.defined(program))]
    return "\n".join([program, *lines])


def timed(programs: list[Program], **options) -> list[list[Verdict]]:
    """The verdicts; prints how long they took."""
    start = time.perf_counter()
    verdicts = sandbox.judge(programs, **options)
    seconds = time.perf_counter() - start
    rate, load = len(programs) / seconds, os.getloadavg()[0]
    print(f"  {len(programs)} programs, {seconds:.1f} s, {rate:.1f} per second, load {load:.1f}", flush=True)
    return verdicts


def compare(file: Path, count: int | None, **options) -> int:
    """Prints the counts of one file and the rows that are not as they should be; returns the number of these."""
    wrong = 0
    rows = code.read(file, sandboxed=False)[:count]
    for kind, change, wanted in (("as given", str, True), ("altered", altered, False)):
        print(f"{file.name}, {kind}:")
        programs = [code.program(change(row["program"]), row) for row in rows]
        verdicts = timed(programs, **options)
        passed = [all(verdict == Verdict.PASSED for verdict in each) for each in verdicts]
        print(f"  {sum(passed)} of {len(rows)} pass all their tests")
        for number, (right, each) in enumerate(zip(passed, verdicts, strict=True), start=1):
            if right != wanted:
                wrong += 1
                print(f"    row {number}: {', '.join(verdict.name for verdict in each)}", flush=True)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?")
    parser.add_argument("--trivial", type=int, default=0)
    parser.add_argument("--backend", choices=sandbox.BACKENDS)
    parser.add_argument("--seconds", type=float, default=1.0, help="limit on a test")
    parser.add_argument("--processes", type=int, help="programs at a time; one per core where not given")
    parser.add_argument("--count", type=int, help="rows of each file; all where not given")
    options = parser.parse_args()
    settings = {
        "backend": options.backend or sandbox.find(),
        "processes": options.processes,
        "limits": Limits(seconds=options.seconds),
    }
    print(f"back end {settings['backend']}")
    wrong = 0
    if options.trivial:
        sandbox.judge([Program("", ("pass",))] * 8, **settings)  # starts the workers
        verdicts = timed([Program("def one():\n    return 1", ("assert one() == 1",))] * options.trivial, **settings)
        passed = sum(each == [Verdict.PASSED] for each in verdicts)
        print(f"  {passed} pass")
        wrong += len(verdicts) - passed
    for name in FILES if options.directory else ():
        wrong += compare(options.directory / name, options.count, **settings)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
