"""Reports the runs of `benchmarks.side_by_side`, as far as they are finished, in tables and figures.

    python -m benchmarks.stability --config configs/compare_stability.py --workdir runs/stability \\
        --arms gdsd=5,espo=5,open:gdsd=5 --rates 1e-4,3e-4,1e-3 --tenfold 2 [--metric cells]

It takes the flags with which the runs were made, evaluates the start once, and trains nothing. The first arm is the one
with which the others are compared, seed by seed. It writes to `WORKDIR/report`:

    report.md     finals of the tried rates; the seeds at the chosen rate; the seeds at ten times that rate
    report.json   the outcome of every run
    seeds.png, tenfold.png   rewards, evaluations and finals of both kinds of seeds
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.side_by_side import Arm, Protocol, Run, parser_of
from gdsd_jax import hub
from gdsd_jax.compare import evaluated_start
from gdsd_jax.evaluation import comparison_figure, reports
from gdsd_jax.evaluation.comparison import outcome, ranks, summarise
from gdsd_jax.evaluation.statistics import interval
from gdsd_jax.runtime.files import read_object, replacing, write_json, write_text
from gdsd_jax.telemetry.metrics import read_metrics


def outcomes(runs: Sequence[Run], metric: str, start: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the outcomes of the finished runs, with their rates, clipped shares, pass@1 and pass@16."""
    found = []
    for run in runs:
        result = outcome(run.config, run.directory, metric, start)
        if result is None:
            continue
        passes = run.directory / "passes" / reports.SUMMARY
        shares = read_object(passes, "remove it")["results"][0]["metrics"] if passes.is_file() else {}
        clipped = [value for entry in read_metrics(run.directory) for name, value in entry.items()
                   if name.startswith("clipped/update_") and value is not None]  # fmt: skip
        found.append(
            result
            | {"rate": run.config.optimizer.learning_rate, "directory": str(run.directory)}
            | {"clipped": float(np.mean(clipped)) if clipped else None}
            | {name.split()[-1]: value["mean"] for name, value in shares.items() if " pass@" in name}
        )
    return found


def percent(values: Sequence[float], form: str = ".1f") -> str:
    """Formats shares in percent: their mean ± half of its 95 % interval, or up to two of them as they are."""
    if len(values) < 3:
        return ", ".join(format(100 * value, form) for value in values) or "-"
    found = interval(values)
    return f"{100 * found['mean']:{form}} ± {50 * (found['high'] - found['low']):.1f}"


def present(runs: Sequence[dict[str, Any]], name: str) -> list[float]:
    """Returns the values of a column in the runs that have one."""
    return [run[name] for run in runs if run.get(name) is not None]


def rates_table(tried: dict[str, list[dict[str, Any]]], rates: Sequence[float], chosen: dict[str, float]) -> str:
    """Formats the final metric and KL at each rate, and the share of clipped log-ratios in updates after the first."""
    body = []
    for arm, runs in tried.items():
        by_rate = {run["rate"]: run for run in runs}
        cells, clipped = [], []
        for rate in rates:
            run = by_rate.get(rate)
            bold = "**" * (rate == chosen.get(arm))
            kl = "" if run is None or run["kl"] is None else f", KL {run['kl']:.2g}"
            cells.append("not made" if run is None else f"{bold}{100 * run['final']:.1f}{bold}{kl}")
            clipped.append("-" if run is None or run["clipped"] is None else f"{100 * run['clipped']:.0f}")
        body.append([f"`{arm}`", *cells, ", ".join(clipped)])
    return reports.markdown(["method", *(f"{rate:g}" for rate in rates), "clipped, %"], body, left=1)


def seeds_table(seeds: dict[str, list[dict[str, Any]]]) -> str:
    """Formats the runs at the chosen rates; the last column is paired by seed with the first arm."""
    header = ["method", "rate", "runs", "final", "best", "best less final", "lost", "KL", "pass@1", "pass@16"]
    body = []
    rows = {row["method"]: row for row in summarise(seeds)}
    first = next(iter(seeds))
    for arm, runs in seeds.items():
        difference = rows[arm]["difference"]
        columns = [percent(present(runs, name)) for name in ("final", "best", "drop")]
        kl = present(runs, "kl")
        body.append(
            [
                f"`{arm}`", f"{runs[0]['rate']:g}", str(len(runs)), *columns,
                str(sum(run["collapsed"] for run in runs)), f"{np.mean(kl):.2g}" if kl else "-",
                *(percent(present(runs, f"pass@{k}")) for k in (1, 16)),
                "-" if difference is None else percent(difference["values"], "+.1f"),
            ]
        )  # fmt: skip
    return reports.markdown([*header, f"vs `{first}`"], body, left=1)


def tenfold_table(tenfold: dict[str, list[dict[str, Any]]]) -> str:
    """Formats the runs at ten times the chosen rates, one by one."""
    body = []
    for arm, runs in tenfold.items():
        since = [str(run["collapsed_at"]) if run["collapsed_at"] is not None else "-" for run in runs]
        body.append(
            [
                f"`{arm}`", f"{runs[0]['rate']:g}", *(", ".join(f"{100 * x:.1f}" for x in present(runs, name))
                                                     for name in ("final", "best")),
                f"{sum(run['collapsed'] for run in runs)} of {len(runs)}", ", ".join(since),
                ", ".join(f"{x:.2g}" for x in present(runs, "kl")) or "-",
            ]
        )  # fmt: skip
    header = ["method", "rate", "final", "best", "collapsed", "half of its best since", "KL"]
    return reports.markdown(header, body, left=1)


def figure(path: Path, found: dict[str, list[dict[str, Any]]], about: dict[str, Any], split: str) -> None:
    """Draws rewards, evaluations and finals of the arms that have finished runs."""
    curves = {arm: [read_metrics(Path(run["directory"])) for run in runs] for arm, runs in found.items()}
    with replacing(path) as draft:
        comparison_figure.draw(draft, about | {"methods": summarise(found)}, curves, split)


def report(protocol: Protocol, arms: Sequence[Arm], metric: str) -> str:
    """Writes the report into the protocol's workdir, and returns its text."""
    config = protocol.config(arms[0])
    begun = evaluated_start(config, hub.fingerprint(config.checkpoint), protocol.workdir / "before")[metric]
    tried, seeds, tenfold, chosen = {}, {}, {}, {}
    for arm in arms:
        name = arm.method if arm.run == "own" else f"{arm.run}:{arm.method}"
        tried[name] = outcomes(protocol.tried(arm), metric, begun)
        later = [run for run in protocol.runs(arm) if run.directory.parts[-3] in ("seeds", "tenfold")]
        for part, found in (("seeds", seeds), ("tenfold", tenfold)):
            if runs := outcomes([run for run in later if run.directory.parts[-3] == part], metric, begun):
                found[name] = runs
        if name in seeds:
            chosen[name] = seeds[name][0]["rate"]
    directory = protocol.workdir / "report"
    directory.mkdir(parents=True, exist_ok=True)
    about = {"task": config.task.name, "metric": metric, "split": "test", "start": begun}
    parts = [
        f"{metric} in percent on the test rows; before training {100 * begun['mean']:.1f} (standard error "
        f"{100 * begun['error']:.1f}).",
        f"Tried rates, seed {config.seed}:",
        rates_table(tried, protocol.rates, chosen),
    ]
    for title, found, table in (
        ("Seeds at the chosen rates:", seeds, seeds_table),
        ("Seeds at ten times the chosen rates:", tenfold, tenfold_table),
    ):
        if found:
            parts += [title, table(found)]
            figure(directory / f"{'seeds' if found is seeds else 'tenfold'}.png", found, about, config.evaluation.split)
    if seeds:
        parts.append(ranks(summarise(seeds)))
    write_json(directory / "report.json", about | {"tried": tried, "seeds": seeds, "tenfold": tenfold})
    text = "\n\n".join(parts) + "\n"
    write_text(directory / "report.md", text)
    return text


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--metric", default="cells", help="metric of the evaluations that the tables show")
    flags = parser.parse_args()
    protocol = Protocol(
        flags.config, flags.workdir, flags.rates, flags.tenfold, math.inf, iterations=flags.iterations, at_once=1
    )
    print(report(protocol, flags.arms, flags.metric))


if __name__ == "__main__":
    main()
