"""Runs contestants side by side, and reports their time and memory.

Every contestant is a process of its own, pinned to the same cores. It sets itself up, warms up (which compiles), and
then works only in its turns: A B A B, so that changes of the machine's load affect all alike. Figures are medians over
turns with their spread, half the distance of the quartiles. CPU seconds count all threads and all processes that the
contestant started. The peak of resident memory is that of the contestant's process, with weights and compilation.

With `--against DIR`, the variants of another checkout of this project take turns with those of this one. They run with
that checkout's `ENVIRONMENT`.

`ENVIRONMENT` makes XLA use 512-bit vectors where the CPU has them, as PyTorch's libraries do by default. The caller's
environment overrides it, and overrides the settings of a bench.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from benchmarks.arguments import number, one_of, parser_of, several
from benchmarks.workloads import WORKLOADS
from gdsd_jax.runtime import ranges
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.files import require_writable

ENVIRONMENT = {
    "XLA_FLAGS": "--xla_cpu_prefer_vector_width=512",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}


class Checkout(NamedTuple):
    """A tree of this project, and the environment in which its benches run."""

    root: Path
    environment: Mapping[str, str]


HERE = Checkout(Path(__file__).parents[1], ENVIRONMENT)


class Job(NamedTuple):
    """A contestant of a bench on a workload; `variant` is one of the bench's references or variants."""

    workload: str
    variant: str
    temperature: float | None = None

    @property
    def label(self) -> str:
        """Returns the name of the workload in the table."""
        return self.workload if self.temperature is None else f"{self.workload} T={self.temperature:g}"


class Contest(NamedTuple):
    """The functions of one contestant.

    work: makes one turn, and waits for its results.
    warm_up: compiles and fills caches; None: one turn does so.
    temporary: returns the temporary bytes of an XLA program, and None for other programs.
    """

    work: Callable[[], Any]
    warm_up: Callable[[], Any] | None = None
    temporary: Callable[[], int | None] = lambda: None


class Bench(NamedTuple):
    """A command that compares contestants.

    module: the module that `python -m` runs.
    description: the text of `--help`.
    prepare: sets a contestant up.
    references: variants that the others are compared with: the one of them with the fewest CPU seconds.
    variants: the other variants.
    workloads: workloads of a run without `--workloads`.
    known: all workloads.
    temperatures: temperatures at which each workload is run; empty if it has none.
    environment: environment variables of all contestants, beside `ENVIRONMENT`.
    """

    module: str
    description: str
    prepare: Callable[[Job], Contest]
    references: Sequence[str]
    variants: Sequence[str]
    workloads: Sequence[str] = ("W1", "W2")
    known: Sequence[str] = tuple(WORKLOADS)
    temperatures: Sequence[str] = ()
    environment: Mapping[str, str] = {}


def main(bench: Bench) -> None:
    """Runs the command of a bench."""
    parser, count = parser_of(bench.description, f"python -m {bench.module}"), number(ranges.Count)

    def flag(name: str, read: Callable[[str], Any], default: Sequence[str], text: str) -> None:
        parser.add_argument(name, type=several(read), default=",".join(default), metavar="A,B", help=text)

    variant = one_of((*bench.references, *bench.variants))
    flag("--workloads", one_of(bench.known), bench.workloads, f"workloads to measure, out of {', '.join(bench.known)}")
    flag("--references", variant, bench.references, "variants with which the others are compared")
    flag("--variants", variant, bench.variants, "the other variants")
    if bench.temperatures:
        flag(
            "--temperatures",
            number(Annotated[float, ranges.Range()]),
            bench.temperatures,
            "temperatures at which each workload is run",
        )
    parser.add_argument("--threads", type=count, default=1, help="cores to which each contestant is pinned")
    parser.add_argument("--turns", type=count, default=3, help="turns, of which the medians are taken")
    parser.add_argument("--json", type=Path, help="keeps the rows")
    parser.add_argument(
        "--against", type=checkout, metavar="DIR", help="another checkout, whose variants take turns too"
    )
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.contestant:
        serve(bench.prepare, Job(*json.loads(flags.contestant)))
        return
    if twice := sorted({*flags.references} & {*flags.variants}):
        parser.error(f"{twice[0]} is both a reference and a variant: take it out of --references or --variants")
    if flags.json:
        try:
            require_writable(flags.json, "--json", file=True)
        except UserError as error:
            parser.error(str(error))
    rows = []
    temperatures = flags.temperatures if bench.temperatures else [None]
    for workload, temperature in itertools.product(flags.workloads, temperatures):
        jobs = [Job(workload, variant, temperature) for variant in (*flags.references, *flags.variants)]
        rows += race(bench, jobs, flags.references, threads=flags.threads, turns=flags.turns, against=flags.against)
        # Earlier measurements are kept when a later workload fails.
        if flags.json:
            flags.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


def checkout(text: str) -> Checkout:
    """Reads the flag `--against`."""
    root = Path(text).absolute()
    if not (root / "benchmarks" / "measure.py").is_file():
        raise argparse.ArgumentTypeError(f"{text} is no checkout of this project: it has no benchmarks/measure.py")
    program = "import json; from benchmarks import measure; print(json.dumps(measure.ENVIRONMENT))"
    run = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    if run.returncode:
        reason = run.stderr.strip().rpartition("\n")[2]
        raise argparse.ArgumentTypeError(f"the benches of {text} cannot be imported here: {reason}")
    return Checkout(root, json.loads(run.stdout))


def cpu_seconds() -> float:
    """Returns the CPU seconds of this process and of all processes that it started, running ones included."""
    total, ended = time.process_time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    total += ended.ru_utime + ended.ru_stime
    family, ticks = {os.getpid()}, os.sysconf("SC_CLK_TCK")
    # A process has a higher number than its parent, unless numbers have wrapped around: then some are missed.
    for process in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) in family:
                family.add(process)
                total += sum(map(int, fields[11:15])) / ticks
    return total


def serve(prepare: Callable[[Job], Contest], job: Job) -> None:
    """Runs a contestant in this process: it sets up, reports that, and then works once for each line that it reads."""
    start = time.perf_counter()
    work, warm_up, temporary = prepare(job)
    built = time.perf_counter()
    (warm_up or work)()
    report = {"setup_seconds": built - start, "warm_up_seconds": time.perf_counter() - built}
    print(json.dumps(report | {"temporary_bytes": temporary()}), flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), cpu_seconds()
        work()
        taken = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": cpu_seconds() - cpu}
        taken["peak_rss_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps(taken), flush=True)


class Contestant:
    """The process of a contestant, which works on demand."""

    def __init__(self, bench: Bench, job: Job, threads: int, tree: Checkout | None = None) -> None:
        cores = sorted(os.sched_getaffinity(0))[:threads]
        root, environment = tree or HERE
        environment = environment | bench.environment | os.environ | {"OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", bench.module, "--contestant", json.dumps(job)]
        self.job, self.turns = job, []
        self.variant = job.variant if tree is None else f"{job.variant} of {root.name}"
        # The cores are set before Python starts, because XLA and PyTorch count them when they make their threads.
        self.process = subprocess.Popen(
            ["taskset", "-c", ",".join(map(str, cores)), *command],
            cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.setup = self._read()

    def _read(self) -> dict:
        """Returns the next line that the process prints, which is JSON."""
        line = self.process.stdout.readline()
        if not line:
            raise UserError(
                f"{self.variant} ended on {self.job.label} with exit code {self.process.wait()}; its output is above"
            )
        return json.loads(line)

    def turn(self) -> None:
        """Lets the process make one turn, and keeps the measurements."""
        with contextlib.suppress(BrokenPipeError):  # `_read` says that the process has ended
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        self.turns.append(self._read())

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()

    def median(self, name: str) -> float:
        """Returns the median of a measurement over the turns."""
        return statistics.median(turn[name] for turn in self.turns)

    def spread(self, name: str) -> float:
        """Returns half the distance of the quartiles of a measurement over the turns."""
        values = [turn[name] for turn in self.turns]
        if len(values) == 1:
            return 0.0
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return (high - low) / 2


def race(
    bench: Bench,
    jobs: Sequence[Job],
    references: Sequence[str],
    *,
    threads: int,
    turns: int,
    against: Checkout | None = None,
) -> list[dict]:
    """Lets the contestants take turns, and returns their rows, each compared with the fastest of the references.

    With `against`, each variant that is no reference has a second contestant, in that checkout.
    """
    contestants: list[Contestant] = []
    try:
        for job in jobs:
            contestants.append(Contestant(bench, job, threads))
            if against is not None and job.variant not in references:
                contestants.append(Contestant(bench, job, threads, against))
        for _ in range(turns):
            for contestant in contestants:
                contestant.turn()
    finally:
        for contestant in contestants:
            contestant.close()
    rivals = [contestant for contestant in contestants if contestant.job.variant in references]
    reference = min(rivals, key=lambda contestant: contestant.median("cpu_seconds"))
    return [row(contestant, reference) for contestant in contestants]


def row(contestant: Contestant, reference: Contestant) -> dict:
    """Returns a contestant's row of the table; a ratio above 1 means that it is faster than the reference."""
    median, spread, job = contestant.median, contestant.spread, contestant.job
    return {
        "workload": job.label,
        "variant": contestant.variant,
        "cpu_seconds": median("cpu_seconds"),
        "cpu_spread": spread("cpu_seconds"),
        "wall_seconds": median("wall_seconds"),
        "wall_spread": spread("wall_seconds"),
        "reference": reference.job.variant,
        "reference_cpu_seconds": reference.median("cpu_seconds"),
        "ratio": reference.median("cpu_seconds") / median("cpu_seconds"),
        "wall_ratio": reference.median("wall_seconds") / median("wall_seconds"),
        "peak_rss_bytes": int(median("peak_rss_bytes")),
        "reference_peak_rss_bytes": int(reference.median("peak_rss_bytes")),
        **contestant.setup,
    }


def table(rows: Sequence[dict]) -> str:
    """Formats the rows as a table in Markdown."""
    lines = [
        "| workload | variant | CPU s | wall s | ratio | peak RSS, MB | memory | XLA temporary, MB | warm-up, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        temporary = "-" if r["temporary_bytes"] is None else f"{r['temporary_bytes'] / 1e6:.0f}"
        lines.append(
            f"| {r['workload']} | {r['variant']} | {r['cpu_seconds']:.2f} ± {r['cpu_spread']:.2f} | "
            f"{r['wall_seconds']:.2f} ± {r['wall_spread']:.2f} | {r['ratio']:.2f} | {r['peak_rss_bytes'] / 1e6:.0f} | "
            f"{r['peak_rss_bytes'] / r['reference_peak_rss_bytes']:.2f} | {temporary} | {r['warm_up_seconds']:.1f} |"
        )
    return "\n".join(lines)
