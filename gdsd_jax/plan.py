"""Plans a run on TPUs that this machine lacks: memory, FLOPs, collectives, roofline time, and whether it fits.

    python -m gdsd_jax.plan --config configs/FILE_pod.py:v5p-64_countdown --topology v5p:2x4x4
        [--mesh data=1,fsdp=32,tensor=1] [--json FILE] [--programs sampler,update] [--search] [--quick] [--top 5]

The command compiles the run's own programs at their real size for the named chips. It works on any machine with
libtpu (`make venv-tpu`, then `.venv-tpu/bin/python`), without weights and without a TPU. Each program takes minutes;
with `--quick` it takes seconds, as the compiler ends before it makes machine code. Then FLOPs, bytes and collectives
are the same, and the peak lacks the machine code, up to 0.1 GiB, and counts gaps between temporary arrays once.
`config.checkpoint` need not exist if its last part is the name of a published model.

    sampler   a whole rollout
    score     the old policy's scores of one micro-batch
    update    a later inner update on the whole rollout: scores of old policy and reference, gradient, optimizer
    exact     the exact log-probability of one micro-batch of rollouts, with one pass for each step; only if --programs
              names it

All figures are per chip. FLOPs, bytes and collectives are counted in the optimised program: the body of a loop counts
as often as the loop runs, and kernels count by the shapes that they are called with. `ratio` is the counted FLOPs over
those that follow from the equations (`gdsd_jax.planning.flops`), recomputation included. `peak` is the compiler's
figure for the program plus the arrays that are in memory beside it. The roofline time is the longest of three times:
FLOPs, HBM bytes and bytes sent, each divided by the chip's published rate. It is a lower bound, not a forecast.
`--top N` names, for each program, the N operations that move the most HBM bytes and the N that send the most network
bytes. The command exits with code 1 if a program does not fit.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax

from gdsd_jax.config import TrainConfig
from gdsd_jax.config.flags import Option, launch
from gdsd_jax.planning import chips
from gdsd_jax.planning.chips import Slice
from gdsd_jax.planning.programs import make_plan
from gdsd_jax.planning.report import PROGRAMS, USUAL, gib, measure, report_of, table
from gdsd_jax.planning.search import search as search_sizes
from gdsd_jax.runtime import ranges
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.files import require_writable, write_json
from gdsd_jax.runtime.sharding import AXES, MeshConfig, make_mesh

COMPILATIONS = 8  # the most that one search may make


def parse_mesh(text: str, default: MeshConfig) -> MeshConfig:
    """Returns the mesh `default` with the sizes that a text such as `data=1,fsdp=32,tensor=1` gives.

    Raises:
      UserError: an axis is unknown, or a size is not a whole number.
    """
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES or not re.fullmatch("-?[0-9]{1,9}", size):
            raise UserError(
                f"--mesh {text!r}: write {','.join(f'{axis}=1' for axis in AXES)}, with -1 for all remaining chips"
            )
        sizes[axis] = int(size)
    return dataclasses.replace(default, **sizes)


def suggestion(config: TrainConfig, topology: Slice, *, quick: bool = False, sampler: bool = True) -> TrainConfig:
    """Returns the config with the mesh and sizes that `search` finds, and prints each trial.

    Args:
      quick: whether the trials are compiled without machine code.
      sampler: whether the rollout has to fit too, or the update alone.

    Raises:
      UserError: no mesh fits.
    """
    devices, fitting = chips.devices(topology), []

    def compiled(config: TrainConfig, name: str) -> dict[str, Any]:
        program = make_plan(config, make_mesh(config.mesh, devices)).programs[name]
        return measure(config, program, topology, quick=name if quick else None)

    def tried(config: TrainConfig, name: str, report: dict[str, Any]) -> None:
        verdict = "fits" if report["fits"] else "does not fit"
        print(f"{name} with {_overrides(config)}: {gib(report['peak_bytes'])} GiB, {verdict}", flush=True)
        if report["fits"]:
            fitting.append((name, config))

    found = search_sizes(config, topology.chips, compiled, tried, compilations=COMPILATIONS, sampler=sampler)
    if found is None:
        less = "a smaller config.lora.rank" if config.lora.rank else "adapters (config.lora.rank)"
        raise UserError(f"no mesh of {topology.name} holds an update: take a larger slice, or {less}")
    fits = ("sampler" if sampler else "update", found) in fitting
    print(f"{'suggestion' if fits else 'nearest, not known to fit'}: {_overrides(found)}\n")
    return found


def _overrides(config: TrainConfig) -> str:
    """Returns the flags that set the mesh, the recomputation and the sizes of a config."""
    mesh = " ".join(f"--config.mesh.{axis}={getattr(config.mesh, axis)}" for axis in AXES)
    sizes = [name for name in ("microbatch_rows", "prompts_per_iteration", "rollout_rows") if getattr(config, name)]
    remat = f"--config.model.remat={config.model.remat}"
    return " ".join([mesh, remat, *(f"--config.{name}={getattr(config, name)}" for name in sizes)])


def main(
    config: TrainConfig,
    workdir: Path | None,
    topology: str | None,
    mesh: str | None,
    programs: str,
    json: str | None,
    search: bool,
    quick: bool,
    top: int,
) -> None:
    if topology is None:
        raise UserError("give --topology CHIP:SIZE, such as v5p:2x4x4")
    wanted = programs.split(",")
    if not set(wanted) <= set(PROGRAMS):
        raise UserError(f"--programs {programs!r}: choose from {','.join(PROGRAMS)}")
    ranges.convert(int, top, "--top")
    where = chips.parse_topology(topology)
    if json:
        require_writable(Path(json), "--json", file=True)
    # The topology names the chips, so this machine's own devices are not used.
    jax.config.update("jax_platforms", "cpu")
    if mesh:
        config = dataclasses.replace(config, mesh=parse_mesh(mesh, config.mesh))
    if search:
        config = suggestion(config, where, quick=quick, sampler="sampler" in wanted)
    report = report_of(config, where, wanted, top=top, quick=quick)
    print(table(report))
    if json:
        Path(json).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(json), report)
    if not report["fits"]:
        raise SystemExit(1)


OPTIONS = {
    "topology": Option(str, None, "Slice as CHIP:SIZE in chips, such as v5e:2x4 or v5p:2x4x4."),
    "mesh": Option(str, None, "Mesh over the slice, such as data=1,fsdp=32,tensor=1, instead of config.mesh."),
    "programs": Option(str, ",".join(USUAL), f"Programs to compile, out of {','.join(PROGRAMS)}."),
    "json": Option(str, None, "File for the report.", written=True),
    "search": Option(bool, False, "Search for the mesh, the recomputation and the sizes that fit."),
    "quick": Option(bool, False, "Stop the compiler before it makes machine code: seconds instead of minutes."),
    "top": Option(int, 0, "Number of operations to name that move the most bytes."),
}

if __name__ == "__main__":
    launch(main, OPTIONS, needs_workdir=False)
