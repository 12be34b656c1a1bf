"""Makes the table of docs/pods_plan.md, which plans the pod configs on their slices.

    make plan-table
    .venv-tpu/bin/python -m gdsd_jax.planning.pods docs/pods_plan.json docs/pods_plan.md [ROW ...]

Compiles the rows that the JSON file does not hold yet: the named ones, such as FILE_pod:v5e-8_countdown, or all. Each
takes a minute or two, and the table is drawn anew from the file after each. Remove the file to plan everything again.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gdsd_jax.config import TrainConfig, freeze
from gdsd_jax.config.flags import enable_compilation_cache
from gdsd_jax.config.read import config_module
from gdsd_jax.planning import chips
from gdsd_jax.planning.report import USUAL, gib, report_of
from gdsd_jax.runtime import front
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.files import read_object


class Row(NamedTuple):
    """A file of pod configs, the part of a row's name after the colon, the slice, and whether all parameters train."""

    file: Path
    run: str
    topology: str
    full: bool

    @property
    def name(self) -> str:
        return f"{self.file.stem}:{self.run}{', all parameters' * self.full}"


COLUMNS = (
    "model, trained", "slice", "chips", "rows, micro-batch", "sampler GiB", "score GiB", "update GiB", "usable GiB",
    "sampler ratio", "score ratio", "update ratio", "rollout s", "update s", "iteration s", "chip-hours", "fits",
    "commit",
)  # fmt: skip
INTRODUCTION = """# Pods, planned

Memory, FLOPs and the least time of the pod configs on slices of TPUs. `make plan-table` made this page with jax {jax}
and libtpu {libtpu}; [pods_plan.json](pods_plan.json) has all figures. Nothing here has run on a TPU: memory is what the
TPU compiler says, FLOPs are counted in its programs, and no run can be faster than the seconds, which follow from the
chips' published rates ([planning](planning.md)).

GiB are the peak memory of a chip, with the arrays that are there beside the program; a rollout that does not fit at
once is sampled in parts. "int8" are frozen matrices in 8 bits. Ratios are the counted FLOPs over those that follow from
the equations. An iteration is a rollout and its inner updates, and chip-hours are those of 1000 iterations. Completions
have 256 tokens, prompts 400, and there are 256 denoising steps, or the largest number where it depends on what is
written. There are 8 inner updates and G = 16, in `sizes_pod` 4 and 8. Each row was compiled from the programs of the
commit that it names; a later commit may have changed them. They were compiled with `--quick`, without machine code
([planning](planning.md) says what that leaves out of the memory).

"""


def rows() -> list[Row]:
    """Returns a row for every slice of every pod config, on its first task. Needs the checkout's root as directory."""
    found = []
    for file in sorted(Path("configs").glob("*_pod.py")):
        module = config_module(file)
        names = [(name, False) for name in module.SLICES]
        names += [(name, True) for name in getattr(module, "ALL_PARAMETERS", ())]
        found += [Row(file, f"{name}_{module.TASKS[0]}", module.SLICES[name][0], full) for name, full in names]
    return found


def row_config(row: Row) -> TrainConfig:
    """Returns the frozen config of a row."""
    config = config_module(row.file).get_config(row.run)
    if row.full:
        with config.unlocked():
            config.lora.rank = 0
    return freeze(TrainConfig, config)


def line(report: dict[str, Any]) -> str:
    """Returns one row of the table, as a line of Markdown."""
    parts = [report[name] for name in USUAL]
    known = all(part["flops"] is not None for part in parts)
    rollout, update = parts[0]["seconds_roofline"], parts[2]["seconds_roofline"]
    pieces = report.get("rollout_parts", 1)
    if known:
        rollout *= pieces
    iteration = rollout + report["inner_updates"] * update if known else None
    trained = f"LoRA {report['lora_rank']}" if report["lora_rank"] else "all"
    trained += ", int8" if report.get("weights") == "int8" else ""
    cells = [
        f"{report['model']}, {trained}", report["topology"], report["chips"],
        f"{report['rows']}{f' in {pieces} parts' if pieces > 1 else ''}, {report['microbatch_rows']}",
        *(gib(part["peak_bytes"]) for part in parts), gib(parts[0]["hbm_bytes"]),
        *("" if part["flops"] is None else f"{part['flops_ratio']:.3f}" for part in parts),
        *("" if value is None else f"{value:.1f}" for value in (rollout, update)),
        f"{iteration:.0f}" if known else "", f"{report['chips'] * 1000 * iteration / 3600:.0f}" if known else "",
        "yes" if report["fits"] else "no", f"`{report['commit']}`",
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |\n"


def commit() -> str:
    """Returns the checkout's commit, with "-dirty" if code or configs differ from it; "unknown" outside a checkout."""
    git = lambda *words: subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip()  # noqa: E731
    dirty = "-dirty" if git("status", "--porcelain", "--", "gdsd_jax", "configs") else ""
    return git("rev-parse", "--short", "HEAD") + dirty or "unknown"


def main(store: Path, page: Path, chosen: list[str]) -> None:
    """Compiles the chosen rows that `store` lacks, or with none chosen all that it lacks, and draws the page."""
    jax.config.update("jax_platforms", "cpu")
    enable_compilation_cache()
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    at = commit()
    reports = read_object(store) if store.exists() else {}
    for row in rows():
        if row.name not in reports and (not chosen or row.name in chosen):
            print(f"planning {row.name}", flush=True)
            report = report_of(row_config(row), chips.parse_topology(row.topology), list(USUAL), quick=True)
            reports[row.name] = report | {"commit": at}
            store.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
        draw(reports, page, versions)


def draw(reports: dict[str, Any], page: Path, versions: dict[str, str]) -> None:
    """Writes the table of the planned rows, and names the rows that are missing."""
    names = [row.name for row in rows()]
    there = [name for name in names if name in reports]
    missing = [name for name in names if name not in reports]
    head = "".join(f"| {' | '.join(cells)} |\n" for cells in (COLUMNS, ("---",) * len(COLUMNS)))
    text = INTRODUCTION.format(**versions) + head + "".join(line(reports[name]) for name in there)
    if missing:
        text += "\nNot compiled yet: " + ", ".join(f"`{name}`" for name in missing) + ".\n"
    page.write_text(text, encoding="utf-8")


def command(arguments: list[str]) -> None:
    """Plans the rows that the arguments ask for: the JSON file, the page, and optional names of rows."""
    if front.HELP & set(arguments):
        print((__doc__ or "").strip())
        return
    if len(arguments) < 2 or any(argument.startswith("-") for argument in arguments):
        raise UserError("usage: python -m gdsd_jax.planning.pods REPORTS.json PAGE.md [ROW ...]")
    known = [row.name for row in rows()]
    unknown = [name for name in arguments[2:] if name not in known]
    if unknown:
        raise UserError(f"unknown row {unknown[0]!r}: choose from {', '.join(known) or 'none: configs/ is not here'}")
    main(Path(arguments[0]), Path(arguments[1]), arguments[2:])


if __name__ == "__main__":
    front.run(lambda: command(sys.argv[1:]))
