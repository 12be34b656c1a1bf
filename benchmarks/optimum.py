"""Measures how near methods come to the known optimum of the toy language, at several learning rates and seeds.

    python -m benchmarks.optimum --rates 1e-3,3e-3 --seeds 0 --json FILE [--png FILE]

For each rate and seed it calls `gdsd_jax.evaluation.enumerated.compare_to_optimum`, which follows every method along 64
updates on one batch of rollouts, in two commit orders, with and without the method's clip, on a random and on a trained
toy. A seed draws the toy, its training and the rollouts. It prints one table per rate and kind of toy, with the
KL to the optimum at the start, its smallest value and its last one, as medians over the seeds. `--png` draws the
trained toy at the first rate. A pair of rate and seed takes about 22 minutes of one core; one that the JSON file
already has is not measured again.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import jax

from benchmarks.arguments import number, parser_of, several
from gdsd_jax.evaluation import reports
from gdsd_jax.evaluation.enumerated import compare_to_optimum
from gdsd_jax.runtime import ranges
from gdsd_jax.runtime.files import read_object, write_json
from gdsd_jax.telemetry.plots import COLOURS

SHOWN = ("gdsd, elbo", "gdsd_tlc", "gdsd_teacher", "espo", "exact_pg")


def table(curves: list[dict[str, Any]]) -> str:
    """Formats curves of one rate and one kind of toy: rows are methods with and without clip, columns commit orders."""
    rows = list(dict.fromkeys((curve["method"], curve["clip"]) for curve in curves))
    orders = list(dict.fromkeys(curve["strategy"] for curve in curves))
    body = []
    for method, clip in rows:
        cells = []
        for order in orders:
            same = [
                [math.inf if x is None else x for x in curve["kl"]]  # JSON has no NaN and no infinity
                for curve in curves
                if (curve["method"], curve["clip"], curve["strategy"]) == (method, clip, order)
            ]
            ends = zip(*((kl[0], min(kl), kl[-1]) for kl in same), strict=True)
            cells.append(", ".join(f"{statistics.median(values):.3f}" for values in ends))
        body.append([f"`{method}`" + ", own clip" * clip, *cells])
    return reports.markdown(["method", *(order.replace("_", " ") for order in orders)], body, left=1)


def draw(path: Path, curves: list[dict[str, Any]]) -> None:
    """Draws the curves of one rate and seed on the trained toy, those with a method's own clip as dashed lines."""
    from matplotlib.figure import Figure

    curves = [curve for curve in curves if curve["trained"] and curve["method"] in SHOWN]
    figure = Figure(figsize=(8.4, 3.3), layout="constrained", dpi=100)
    for axes, order in zip(figure.subplots(1, 2, sharey=True), ("random", "low_confidence"), strict=True):
        for curve in (curve for curve in curves if curve["strategy"] == order):
            clip = curve["clip"]
            style = {"color": COLOURS[SHOWN.index(curve["method"])], "linestyle": "--" if clip else "-", "marker": "o"}
            axes.plot(curve["kl"], markersize=3, label=None if clip else curve["method"], **style)
        axes.axhline(curve["kl"][0], color="0.35", linewidth=1, linestyle=":")
        axes.set_title(order.replace("_", " "), fontsize=10, loc="left")
        axes.set_xticks(range(len(curve["update"])), curve["update"], fontsize=8)
        axes.set_xlabel("updates on one batch (dashed: own clip)", fontsize=8)
        axes.set_yscale("log")
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("KL to the optimum (nats)", fontsize=9)
    figure.axes[0].legend(fontsize=7, frameon=False)
    figure.savefig(path, format="png")


def main() -> None:
    parser = parser_of(__doc__)
    rates, seeds = several(number(ranges.Positive)), several(number(ranges.Seed))
    parser.add_argument("--rates", type=rates, default="1e-3,3e-3", help="learning rates, with commas between")
    parser.add_argument("--seeds", type=seeds, default="0", help="seeds, with commas between")
    parser.add_argument("--json", type=Path, required=True, help="keeps all curves")
    parser.add_argument("--png", type=Path, help="draws the curves of the trained toy at the first rate and seed")
    flags = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    rates, seeds = flags.rates, flags.seeds
    kept = read_object(flags.json, "remove it") if flags.json.is_file() else {}
    for seed in seeds:
        for rate in rates:
            name = f"{rate:g}, {seed}"
            if name not in kept:
                print(f"rate {rate:g}, seed {seed}", flush=True)
                report = lambda line: print(f"  {line}", flush=True)  # noqa: E731
                kept[name] = compare_to_optimum(learning_rate=rate, seed=seed, report=report)
                write_json(flags.json, kept)
    kept = read_object(flags.json, "remove it")
    for rate in rates:
        for trained in (True, False):
            curves = [c for seed in seeds for c in kept[f"{rate:g}, {seed}"] if c["trained"] == trained]
            print(f"\nrate {rate:g}, {'trained' if trained else 'random'} toy, median of {len(seeds)} seeds\n")
            print(table(curves))
    if flags.png is not None:
        draw(flags.png, kept[f"{rates[0]:g}, {seeds[0]}"])


if __name__ == "__main__":
    main()
