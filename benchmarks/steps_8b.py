"""Plans one denoising step of LLaDA-8B on TPU slices that this machine lacks: full, prefix and dual, on several meshes.

    .venv-tpu/bin/python -m benchmarks.steps_8b [--topologies v5p:2x2x4,v5e:8x8] [--json FILE]

Each step is compiled by libtpu at its real size: 320 completions, prompt 400, completion 256, blocks of 32, bfloat16,
LoRA rank 128, the head on the block alone. As in `gdsd_jax.plan`, its time is the longest of compute, HBM and network
at the chip's published rates, which is a lower bound. A prefix step computes half of the completion, the mean over its
blocks. Cached steps read the keys and values of a refresh at the start of each block; `cycle` is the mean time of a
step, this refresh included, at one token per step. The table ends with the update from docs/pods_plan.json, on the mesh
of the slice's config. Nothing here has run on a TPU.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.arguments import parser_of
from gdsd_jax import hub
from gdsd_jax.config import TrainConfig, freeze
from gdsd_jax.config.flags import enable_compilation_cache
from gdsd_jax.config.read import config_module
from gdsd_jax.denoiser import hidden_states_at, refresh_cache, window_states_at
from gdsd_jax.diffusion.proposals import propose
from gdsd_jax.planning import chips
from gdsd_jax.planning.compiler import compile_program
from gdsd_jax.planning.cost import program_cost
from gdsd_jax.planning.programs import parameters, place
from gdsd_jax.runtime.sharding import MeshConfig, make_mesh
from gdsd_jax.training.optimizer import make_optimizer
from gdsd_jax.training.setup import with_compute
from gdsd_jax.training.state import policy

ROOT = Path(__file__).parents[1]
PLANS = ROOT / "docs" / "pods_plan.json"
TENSOR = (1, 4)


def steps(config: TrainConfig, mesh: jax.sharding.Mesh) -> dict[str, Callable[[], jax.stages.Lowered]]:
    """Returns functions that lower the program of each kind of step, by name."""
    model = with_compute(hub.architecture(config.checkpoint), config.model)
    optimizer, _ = make_optimizer(config.optimizer, 1)
    base, state = parameters(config, model, mesh, optimizer)
    base, lora = policy(base, state.params)
    rows, prompt = config.prompts_per_iteration * config.group_size, max(config.prompt_buckets)
    settings = dataclasses.replace(config.sampler, temperature=1.0)
    size, total = settings.block_length, prompt + settings.completion_length

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return place(mesh, jax.ShapeDtypeStruct(shape, dtype), ("rows", "tokens", "tokens")[: len(shape)])

    scalar = place(mesh, jax.ShapeDtypeStruct((), jnp.int32), ())
    tokens, mask, uniform = array(jnp.int32, rows, total), array(bool, rows, prompt), array(jnp.float32, rows, size, 2)

    def commit(base: Any, hidden: jax.Array, uniform: jax.Array) -> tuple:
        return propose(model, base, hidden[None], uniform, settings)

    @jax.jit
    def full(base: Any, lora: Any, tokens: jax.Array, mask: jax.Array, start: jax.Array, uniform: jax.Array) -> tuple:
        read = hidden_states_at(model, base, lora, tokens, prompt_mask=mask)
        return commit(base, read(prompt + start + jnp.arange(size)), uniform)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def cached(
        width: int, whole: bool, base: Any, lora: Any, tokens: jax.Array, mask: jax.Array, cache: Any,
        start: jax.Array, uniform: jax.Array,
    ) -> tuple:  # fmt: skip
        read = window_states_at(
            model, base, lora, tokens, cache,
            start=prompt + start, size=width, frozen=prompt + start if whole else None, prompt_mask=mask,
        )  # fmt: skip
        return commit(base, read(jnp.arange(size)), uniform)

    def window(width: int, whole: bool) -> jax.stages.Lowered:
        """Lowers a step under a cache of all tokens (`whole`), or of those around the window."""

        def refreshed(base: Any, lora: Any, tokens: jax.Array, start: jax.Array) -> Any:
            around = None if whole else (start, width)
            return refresh_cache(model, base, lora, tokens, jnp.arange(size), around=around)[1]

        kept = jax.eval_shape(refreshed, base, lora, tokens, scalar)
        front = ("layers", "rows", "kv_heads")
        cache = kept._replace(
            keys=place(mesh, kept.keys, (*front, "head_dim", "tokens")),
            values=place(mesh, kept.values, (*front, "tokens", "head_dim")),
        )
        return cached.lower(width, whole, base, lora, tokens, mask, cache, scalar, uniform)

    return {
        "full": lambda: full.lower(base, lora, tokens, mask, scalar, uniform),
        "prefix": lambda: window(settings.completion_length // 2, True),
        "dual": lambda: window(size, False),
    }


def rows(topology: chips.Slice, config: TrainConfig) -> Iterator[dict[str, Any]]:
    """Yields a row of results for each mesh and step."""
    completions = config.prompts_per_iteration * config.group_size
    for tensor in TENSOR:
        mesh = make_mesh(MeshConfig(1, topology.chips // tensor, tensor), chips.devices(topology))
        full = None
        for name, lower in steps(config, mesh).items():
            with jax.set_mesh(mesh):
                compiled = compile_program(lower(), topology.name)
            row = {"topology": topology.name, "mesh": dict(mesh.shape), "step": name, "fits": compiled.fits}
            row["peak_bytes"] = compiled.peak_bytes
            if compiled.fits:
                cost = program_cost(compiled.text)
                seconds = {
                    "compute": cost.flops / topology.chip.flops,
                    "hbm": cost.hbm / topology.chip.hbm_bandwidth,
                    "network": sum(cost.sent.values()) / topology.network_bandwidth,
                }
                longest = max(seconds.values())
                full = full or longest
                block = config.sampler.block_length
                cycle = longest if name == "full" else (full + (block - 1) * longest) / block
                row |= {"flops": cost.flops, "seconds": seconds, "seconds_roofline": longest, "cycle": cycle}
                row |= {"bound_by": max(seconds, key=seconds.get)}
                row["tokens_per_second_per_chip"] = completions / cycle / topology.chips
            yield row


def update(topology: str) -> dict[str, Any]:
    """Returns the row of the planned inner update; it has no tokens per second, as an update samples none."""
    plans = json.loads(PLANS.read_text()).values()
    plan = next(p for p in plans if p["topology"] == topology and p["model"].startswith("LLaDA") and p["lora_rank"])
    return plan["update"] | {"topology": topology, "mesh": plan["mesh"], "step": "update"}


def table(found: list[dict[str, Any]]) -> str:
    """Formats the rows in Markdown; the best mesh of each step is marked, and the longest of its times is bold."""
    lines = [
        "| slice | step | fsdp x tensor | TFLOP | compute ms | HBM ms | network ms | tokens/s/chip | best |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        mesh = f"{row['mesh']['fsdp']} x {row['mesh']['tensor']}"
        if not row["fits"]:
            lines.append(f"| {row['topology']} | {row['step']} | {mesh} | does not fit | | | | | |")
            continue
        rivals = [r for r in found if (r["topology"], r["step"]) == (row["topology"], row["step"]) and r["fits"]]
        best = len(rivals) > 1 and max(rivals, key=lambda r: r["tokens_per_second_per_chip"]) is row
        bold = lambda kind: "**" * (kind == row["bound_by"])  # noqa: B023, E731
        seconds = (f"{bold(k)}{1e3 * row['seconds'][k]:.1f}{bold(k)}" for k in ("compute", "hbm", "network"))
        tokens = f"{row['tokens_per_second_per_chip']:.0f}" if "tokens_per_second_per_chip" in row else ""
        lines.append(
            f"| {row['topology']} | {row['step']} | {mesh} | {row['flops'] / 1e12:.2f} | {' | '.join(seconds)} | "
            f"{tokens} | {'*' if best else ''} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = parser_of(__doc__)
    text = "slices, each as CHIP:SIZE, with commas between"
    parser.add_argument("--topologies", default="v5p:2x2x4,v5e:8x8", help=text)
    parser.add_argument("--json", type=Path, help="keeps the rows")
    flags = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    enable_compilation_cache()
    config = freeze(TrainConfig, config_module(ROOT / "configs" / "llada_8b_pod.py").get_config("v5p-32_countdown"))
    config = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, block_length=32))
    found = []
    for name in flags.topologies.split(","):
        for row in itertools.chain(rows(chips.parse_topology(name), config), [update(name)]):
            found.append(row)
            print(json.dumps(row), flush=True)
            if flags.json:
                flags.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
