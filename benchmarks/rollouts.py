"""Compares GDSD trained on exact rollouts with GDSD trained on approximate ones, on the tiny model over several seeds.

    python -m benchmarks.rollouts --workdir runs/rollouts [--seeds 3] [--ways exact,dual,threshold]

All runs have the same start and the settings of configs/compare_tiny.py, except for the sampler. Completions have 20
tokens in blocks of 5. `exact` commits one token per step and takes 20 full passes. `dual` keeps keys and values outside
the block, and takes 4 full passes and 16 of the block. `threshold` commits all tokens above 0.9 at once. The final
accuracy is always that of exact greedy decoding. The same command resumes an interrupted study. It writes `table.json`,
`table.md` and `curves.png`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from benchmarks.arguments import number, one_of, parser_of, several
from gdsd_jax.compare import compare
from gdsd_jax.config import TrainConfig, freeze, read_config
from gdsd_jax.config.flags import enable_compilation_cache
from gdsd_jax.evaluation.comparison import CURVES, TABLE_JSON, TABLE_MD, markdown, summarise
from gdsd_jax.evaluation.comparison_figure import draw
from gdsd_jax.runtime import ranges
from gdsd_jax.telemetry.metrics import read_metrics

ROOT = Path(__file__).parents[1]
WAYS = {"exact": {}, "dual": {"cache": "dual"}, "threshold": {"threshold": 0.9}}


def base_config() -> TrainConfig:
    """Returns the config of configs/compare_tiny.py with blocks and without its threshold."""
    config = freeze(TrainConfig, read_config(ROOT / "configs" / "compare_tiny.py"))
    return dataclasses.replace(
        config, sampler=dataclasses.replace(config.sampler, block_length=5, threshold=None), method="gdsd"
    )


def study(config: TrainConfig, workdir: Path, ways: list[str], seeds: int) -> dict:
    """Makes the missing runs, and returns the table of `gdsd_jax.compare` with one row for each way."""
    tables, curves = {}, {}
    for way in ways:
        run = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, **WAYS[way]))
        tables[way] = compare(run, workdir / way, ["gdsd"], seeds)
        curves[way] = [read_metrics(workdir / way / "gdsd" / f"seed{config.seed + n}") for n in range(seeds)]
    first = tables[ways[0]]
    rows = summarise({way: table["methods"][0]["runs"] for way, table in tables.items()})
    counts = {name: sum(table[name] for table in tables.values()) for name in ("runs", "runs_in")}
    table = first | counts | {"methods": rows}
    (workdir / TABLE_JSON).write_text(json.dumps(table, indent=1) + "\n")
    (workdir / TABLE_MD).write_text(markdown(table))
    draw(workdir / CURVES, table, curves, config.evaluation.split)
    return table


def main() -> None:
    parser = parser_of(__doc__)
    ways = several(one_of(tuple(WAYS)))
    parser.add_argument("--workdir", type=Path, required=True, help="directory of all runs and of the results")
    parser.add_argument("--seeds", type=number(ranges.Count), default=3, help="runs of each way")
    parser.add_argument("--ways", type=ways, default=",".join(WAYS), help="ways to roll out, with commas between")
    flags = parser.parse_args()
    enable_compilation_cache()
    print(markdown(study(base_config(), flags.workdir, flags.ways, flags.seeds)))


if __name__ == "__main__":
    main()
