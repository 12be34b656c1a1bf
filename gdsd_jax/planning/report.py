"""Reports what each program of a run needs on one chip of a slice, as plain JSON values and as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gdsd_jax import hub
from gdsd_jax.config import TrainConfig
from gdsd_jax.planning import chips
from gdsd_jax.planning.chips import GIB, Slice
from gdsd_jax.planning.compiler import compile_program
from gdsd_jax.planning.cost import program_cost
from gdsd_jax.planning.programs import Program, make_plan, with_sizes
from gdsd_jax.planning.quick import compile_quickly
from gdsd_jax.runtime.sharding import make_mesh
from gdsd_jax.training.setup import dimensions, spread_rows

PROGRAMS = ("sampler", "score", "update", "exact")
USUAL = PROGRAMS[:3]  # those of every run; exact log-probabilities are computed where somebody asks for them


def measure(
    config: TrainConfig, program: Program, topology: Slice, *, top: int = 0, quick: str | None = None
) -> dict[str, Any]:
    """Compiles one program of a run and reports what it needs on one chip, in plain JSON values.

    Args:
      top: how many of the largest movers of HBM bytes and of network bytes to list.
      quick: the program's name, if it is to be compiled without machine code (`gdsd_jax.planning.quick`).
    """
    if quick is None:
        compiled = compile_program(program.lower(), topology.name)
    else:
        compiled = compile_quickly(config, topology, quick, program.lower())
    chip = topology.chip
    report: dict[str, Any] = {
        "what": program.what,
        "hbm_bytes": chip.hbm_bytes,
        "beside_bytes": program.beside,
        "peak_bytes": compiled.peak_bytes + program.beside,
        "flops_analytic": program.flops / topology.chips,
    }
    report["fits"] = compiled.fits and report["peak_bytes"] <= chip.hbm_bytes
    if not compiled.fits:
        return report | {"flops": None, "seconds_roofline": None}
    cost = program_cost(compiled.text, open_loops=program.loops)
    seconds = {
        "compute": cost.flops / chip.flops,
        "hbm": cost.hbm / chip.hbm_bandwidth,
        "network": sum(cost.sent.values()) / topology.network_bandwidth if topology.chips > 1 else 0.0,
    }
    longest = max(seconds.values())
    movers = {"hbm": cost.hbm_by, "network": cost.sent_by}
    if top:
        report["largest"] = {kind: dict(by.most_common(top)) for kind, by in movers.items()}
    return report | {
        "argument_bytes": compiled.arguments,
        "output_bytes": compiled.outputs - compiled.aliased,
        "temporary_bytes": compiled.temporary,
        "flops": cost.flops,
        "flops_ratio": cost.flops / report["flops_analytic"],
        "bytes_accessed": cost.hbm,
        "collectives": {kind: {"calls": cost.calls[kind], "bytes_sent": cost.sent[kind]} for kind in cost.calls},
        "kernels": dict(cost.kernels),
        "seconds": seconds,
        "seconds_roofline": longest,
        "bound_by": max(seconds, key=seconds.get),
        "utilisation": report["flops_analytic"] / (chip.flops * longest),
    }


def report_of(
    config: TrainConfig, topology: Slice, programs: list[str], *, top: int = 0, quick: bool = False
) -> dict[str, Any]:
    """Returns the report of a run on a slice, in plain JSON values.

    Args:
      top: as for `measure`.
      quick: whether the programs are compiled without machine code.

    Raises:
      UserError: libtpu is missing, or model, mesh and rows do not fit together.
    """
    needed = dimensions(hub.architecture(config.checkpoint, config.overrides), spread_rows(config))
    mesh = make_mesh(config.mesh, chips.devices(topology), dimensions=needed)
    config = with_sizes(config, mesh, topology.chip.hbm_bytes)
    plan = make_plan(config, mesh)
    rollout = config.prompts_per_iteration * config.group_size
    reports = {
        name: measure(config, plan.programs[name], topology, top=top, quick=name if quick else None)
        for name in programs
    }
    return {
        "model": Path(config.checkpoint).name,
        "method": config.method,
        "quick": quick,
        "lora_rank": config.lora.rank,
        "weights": config.model.weights,
        "remat": config.model.remat,
        "topology": topology.name,
        "chips": topology.chips,
        "mesh": dict(mesh.shape),
        "rows": rollout,
        "rollout_rows": config.rollout_rows or rollout,
        "rollout_parts": rollout // (config.rollout_rows or rollout),
        "microbatch_rows": config.microbatch_rows,
        "inner_updates": config.inner_updates,
        "parameter_bytes": plan.parameter_bytes,
        "optimizer_bytes": plan.optimizer_bytes,
        "fits": all(report["fits"] for report in reports.values()),
        **reports,
    }


def table(report: dict[str, Any]) -> str:
    """Formats a report as text, in lines of at most 80 columns."""
    mesh = ",".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    trained = f"adapters of rank {report['lora_rank']}" if report["lora_rank"] else "all parameters"
    parts, some = report["rollout_parts"], report["microbatch_rows"]
    lines = [
        f"{report['model']} on {report['topology']}: {report['chips']} chips, mesh {mesh}",
        f"{report['method']}, {trained} trained, weights {report['weights']}",
        f"{parts} x {report['rollout_rows']} rows sampled, {some} rows a micro-batch, remat {report['remat']}",
        f"per chip: parameters {gib(report['parameter_bytes'])} GiB, optimizer {gib(report['optimizer_bytes'])} GiB",
        "",
        "program fits   temp   peak     of    TFLOP ratio   HBM GB  sent GB  seconds use",
        "                GiB    GiB    GiB                                           %",
    ]
    shown = [name for name in PROGRAMS if name in report]
    for name in shown:
        part = report[name]
        room = f"{gib(part['peak_bytes']):>7}{gib(part['hbm_bytes']):>7}"
        if part["flops"] is None:
            lines.append(f"{name:8}  NO      -{room}")
            continue
        sent = sum(kind["bytes_sent"] for kind in part["collectives"].values())
        counts = (part["bytes_accessed"] / 1e9, sent / 1e9, part["seconds_roofline"])
        lines.append(
            f"{name:8}{'yes' if part['fits'] else 'NO':>4}{gib(part['temporary_bytes']):>7}{room}"
            f"{_short(part['flops'] / 1e12):>9}{part['flops_ratio']:>6.3f}"
            + "".join(f"{_short(value):>9}" for value in counts)
            + f"{100 * part['utilisation']:>4.0f}"
        )
    for name in shown:
        part = report[name]
        lines += ["", f"{name}: {part['what']}"]
        if part["flops"] is None:
            continue
        seconds = ", ".join(f"{kind} {value:.4g}" for kind, value in part["seconds"].items())
        lines.append(f"  seconds: {seconds}; bound by {part['bound_by']}")
        for kind, found in part["collectives"].items():
            lines.append(f"  {kind}: {found['calls']} calls, {found['bytes_sent'] / 1e9:.4g} GB sent")
        for kernel, count in part["kernels"].items():
            lines.append(f"  kernel {kernel}: {count} calls")
        for kind, movers in part.get("largest", {}).items():
            lines += [f"  {kind} {moved / 1e9:.4g} GB: {mover}"[:80] for mover, moved in movers.items()]
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"
