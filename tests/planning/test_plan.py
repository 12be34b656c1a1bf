"""The planner: loops and costs read from HLO, analytic counts, chips, reports, refusals, and one real compilation."""

import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict
from tiny_run import command

from gdsd_jax import config as settings
from gdsd_jax import hub, plan
from gdsd_jax.config import TrainConfig, freeze
from gdsd_jax.denoiser import hidden_states, logical_axes
from gdsd_jax.families import read_config
from gdsd_jax.hub.names import hf_config
from gdsd_jax.hub.published import LLADA_8B, PUBLISHED
from gdsd_jax.planning import chips, cost, pods, programs, quick, report
from gdsd_jax.planning.compiler import Compiled, compile_program, needed_bytes
from gdsd_jax.runtime import sharding
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.sharding import MeshConfig, make_mesh
from gdsd_jax.telemetry import planned

ROOT = Path(__file__).resolve().parents[2]

# ------------------------------------------------------------------------------------------------ loops and counts


def cost_of(function, *shapes, **options):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return cost.program_cost(jax.jit(function).lower(*arrays).compile().as_text(), **options)


def test_products_inside_loops_count_as_often_as_the_loops_run():
    """A scan of 7 in a scan of 5, and a product beside them."""

    def nested(x, w):
        inner = lambda x, _: (jnp.tanh(x @ w), None)  # noqa: E731
        outer = lambda x, _: (jax.lax.scan(inner, x, length=7)[0], None)  # noqa: E731
        return jax.lax.scan(outer, x, length=5)[0] @ w

    assert cost_of(nested, (48, 64), (64, 64)).flops == 2 * 48 * 64 * 64 * (5 * 7 + 1)


def test_loops_with_other_starts_and_steps():
    def odd(x, w):
        def body(state):
            i, x = state
            return i + 3, jnp.tanh(x @ w)

        return jax.lax.while_loop(lambda state: state[0] < 20, body, (jnp.int32(2), x))[1]

    found = cost_of(odd, (16, 32), (32, 32))
    assert (found.flops, found.open_loops) == (2 * 16 * 32 * 32 * 6, 0)


def test_loops_over_blocks_and_steps_as_the_sampler_has_them():
    """The condition reads one counter, which moves when another wraps around."""

    def sampler(x, w):
        def body(state):
            block, step, x = state
            done = step == 3
            return block + done, jnp.where(done, 0, step + 1), jnp.tanh(x @ w)

        return jax.lax.while_loop(lambda state: state[0] < 5, body, (jnp.int32(0), jnp.int32(0), x))[2]

    found = cost_of(sampler, (16, 32), (32, 32))
    assert (found.flops, found.open_loops) == (2 * 16 * 32 * 32 * 20, 0)


def test_loops_that_hang_on_data_run_as_often_as_the_caller_says():
    def search(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: jnp.tanh(x @ w), x)

    found = cost_of(search, (16, 32), (32, 32), open_loops=(11,))
    assert (found.flops, found.open_loops) == (2 * 16 * 32 * 32 * 11, 1)

    def nested(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 2, lambda x: search(x, w) - 1, x)

    found = cost_of(nested, (16, 32), (32, 32), open_loops=(3, 5))
    assert (found.flops, found.open_loops) == (2 * 16 * 32 * 32 * 15, 2)


@pytest.mark.parametrize(
    ("window", "labels", "inputs", "kernel", "result", "products"),
    [
        # A product, a batch of 32 x 32 products, and two halves of a contraction, as the TPU compiler writes them.
        ("size=1", "0bf_io0->0bf", (32, 656, 512), (512, 4096, 1), (32, 656, 4096), 32 * 656 * 512 * 4096),
        (
            "size=32x32 stride=31x31 lhs_dilate=32x32", "0b1f_0o1i->01bf",
            (32, 656, 32, 128), (32, 656, 32, 128), (32, 32, 656, 656), 32 * 32 * 656 * 656 * 128,
        ),
        ("size=2x1", "1b0f_0io1->1bf0", (4, 656, 2, 512), (2, 512, 64, 1), (4, 656, 64, 1), 4 * 656 * 64 * 1024),
        (
            "size=1x2 pad=0_0x1_1 rhs_reversal=0x1", "0bf1_i1o0->0b1f",
            (4, 656, 64, 1), (64, 2, 512, 1), (4, 656, 2, 512), 4 * 656 * 64 * 1024,
        ),
    ],
)  # fmt: skip
def test_products_written_as_convolutions(window, labels, inputs, kernel, result, products):
    shapes = [",".join(map(str, shape)) for shape in (inputs, kernel, result)]
    text = (
        f"ENTRY %main (a: bf16[{shapes[0]}], b: bf16[{shapes[1]}]) -> bf16[{shapes[2]}] {{\n"
        f"  %a = bf16[{shapes[0]}]{{3,2,1,0:T(8,128)(2,1)}} parameter(0)\n"
        f"  %b = bf16[{shapes[1]}]{{3,2,1,0:T(8,128)(2,1)}} parameter(1)\n"
        f"  ROOT %c = bf16[{shapes[2]}]{{3,2,1,0}} convolution(%a, %b), window={{{window}}}, dim_labels={labels}\n}}\n"
    )
    assert cost.program_cost(text).flops == 2 * products


MODULE = """
%fused (p0: f32[32,1024], p1: s32[]) -> f32[1,1024] {
  %p0 = f32[32,1024]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,1024]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,1024}
}

ENTRY %main (p0: f32[32,1024], p1: s32[], q: bf16[2,4,256,128]) -> f32[8,1024] {
  %p0 = f32[32,1024]{1,0} parameter(0)
  %p1 = s32[]{:S(6)} parameter(1)
  %q = bf16[2,4,256,128]{3,2,1,0:T(8,128)(2,1)S(1)} parameter(2)
  %mask = s8[1,2,2]{2,1,0:S(1)} constant({...})
  %one = f32[1,1024]{1,0} fusion(%p0, %p1), kind=kLoop, calls=%fused
  %splash_mha_fwd_segmented_no_residuals.7 = bf16[2,4,256,128]{3,2,1,0:S(1)} custom-call(%mask, %q, %q, %q), custom_call_target="tpu_custom_call"
  %gather-start = (f32[1,1024]{1,0}, f32[8,1024]{1,0}) all-gather-start(%one), replica_groups=[2,8]<=[16], dimensions={0}
  ROOT %gather = f32[8,1024]{1,0} all-gather-done(%gather-start)
}
"""  # noqa: E501


def test_bytes_kernels_and_collectives():
    """A fusion reads the slice that it takes, on-chip memory is free, a ring of 8 sends 7 shards."""
    found = cost.program_cost(MODULE)
    row = 1024 * 4
    assert found.hbm == (row + row) + (row + 8 * row)
    assert found.kernels == {"splash_mha_fwd_segmented_no_residuals": 1}
    assert found.flops == 2 * 2 * (2 * 4 * 256 * 128) * 256
    assert (found.calls, found.sent) == ({"all-gather": 1}, {"all-gather": 7 * row})
    with pytest.raises(ValueError, match="KERNELS"):
        cost.program_cost(MODULE.replace("splash_mha_fwd_segmented_no_residuals", "unheard_of"))


# An asynchronous gather as the TPU compiler writes it in a loop of 3: started, carried along by a product, ended.
CLONES = """
%start (p0: bf16[8,128]) -> bf16[64,128] {
  %p0 = bf16[8,128]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[64,128]{1,0} all-gather(%p0), channel_id=8, replica_groups=[1,8]<=[8], dimensions={0}, metadata={op_name="jit(f)/layers/while/body/closed_call/q/convert_element_type"}
}

%carry (p0: bf16[8,128], p1: bf16[64,128]) -> bf16[64,64] {
  %p0 = bf16[8,128]{1,0} parameter(0)
  %p1 = bf16[64,128]{1,0} parameter(1)
  %all-gather.2 = bf16[64,128]{1,0} all-gather(%p0), channel_id=8, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %dot = bf16[64,64]{1,0} dot(%p1, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%body (s: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %s = (s32[], bf16[8,128]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = bf16[8,128]{1,0} get-tuple-element(%s), index=1
  %begun = bf16[64,128]{1,0} fusion(%x), kind=kCustom, calls=%start
  %carried = bf16[64,64]{1,0} fusion(%x, %begun), kind=kOutput, calls=%carry
  %ended = bf16[64,128]{1,0} fusion(%x), kind=kCustom, calls=%start
  %other = bf16[64,128]{1,0} all-gather(%x), channel_id=9, replica_groups=[1,8]<=[8], dimensions={0}
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], bf16[8,128]) tuple(%next, %x)
}

%condition (s: (s32[], bf16[8,128])) -> pred[] {
  %s = (s32[], bf16[8,128]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %three), direction=LT
}

ENTRY %main (p: bf16[8,128]) -> (s32[], bf16[8,128]) {
  %p = bf16[8,128]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start_state = (s32[], bf16[8,128]) tuple(%zero, %p)
  ROOT %loop = (s32[], bf16[8,128]) while(%start_state), condition=%condition, body=%body
}
"""  # noqa: E501


def test_clones_of_a_collective_count_once_in_each_execution():
    found = cost.program_cost(CLONES)
    shard = 8 * 128 * 2
    assert found.calls == {"all-gather": 3 * 2} and found.sent == {"all-gather": 3 * 2 * 7 * shard}
    assert found.flops == 3 * 2 * 64 * 64 * 128
    # By the operation of the program, or else by the instruction.
    movers = ("all-gather layers/q/convert_element_type", "all-gather other")
    assert found.sent_by == dict.fromkeys(movers, 3 * 7 * shard)
    assert sum(found.hbm_by.values()) == found.hbm


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_1'}, dimensions={1}", 8),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_0','axis_1'}, dimensions={1}", 16),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=2], device_ids=([2,8]T(1,0)) {'axis_0'}, dimensions={1}", 8),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={1}", 2),
        ("replica_groups={{0,1,2},{3,4,5}}, dimensions={1}", 3),
    ],
)
def test_sizes_of_collective_groups(groups, size):
    assert cost.group_size(groups) == size


# ------------------------------------------------------------------------------------------------ chips and models


def test_topologies():
    one_host, pod = chips.parse_topology("v5e:2x4"), chips.parse_topology("v5p:4x4x4")
    assert (one_host.chips, pod.chips) == (8, 64)
    # A corner of 2 x 4 chips has two of the four links; 16 x 16 and whole cubes are closed.
    assert one_host.network_bandwidth == one_host.chip.ici_bandwidth / 2
    assert chips.parse_topology("v5e:16x16").network_bandwidth == one_host.chip.ici_bandwidth
    assert pod.network_bandwidth == pod.chip.ici_bandwidth
    assert chips.parse_topology("v5p:2x4x4").network_bandwidth == pod.chip.ici_bandwidth / 2
    for name in ("v9:2x2", "v5p:4x4", "v5e:2x0", "v5e"):
        with pytest.raises(UserError, match="--topology"):
            chips.parse_topology(name)


def test_sizes_of_models_that_are_not_here(tmp_path):
    """By the directory's name, and from its config.json where there is one."""
    for name, published in PUBLISHED.items():
        assert hub.architecture(tmp_path / name) == published
        assert read_config(hf_config(published)) == published
    parameters = {"LLaDA-8B-Instruct": 8.02e9, "Dream-v0-Instruct-7B": 7.62e9}
    for name, count in parameters.items():
        sizes = jax.tree.leaves(programs.base_shapes(hub.architecture(name)))
        assert sum(x.size for x in sizes) == pytest.approx(count, rel=2e-3)
    with pytest.raises(UserError, match="LLaDA-8B-Instruct"):
        hub.architecture(tmp_path / "Unknown-8B")


def test_refusals_of_the_compiler():
    """The two ways in which it says how much a program needs, and another error."""
    one = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 23.50G of 15.75G hbm. Exceeded hbm capacity"
    two = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for temporaries (180.47G) exceeds"
    assert needed_bytes(one) == int(23.5 * 2**30)
    assert needed_bytes(two) == int(180.47 * 2**30)
    assert needed_bytes("INTERNAL: something else") is None


# -------------------------------------------------------------------------------------------------- the real programs


def tiny(directory) -> TrainConfig:
    """Shapes with enough of everything: groups of heads, blocks, several micro-batches, a vocabulary in chunks."""
    model = dataclasses.replace(
        hub.architecture("LLaDA-8B-Instruct"), vocab_size=512, hidden_size=64, num_layers=3, num_heads=4,
        num_kv_heads=2, intermediate_size=160, mask_token_id=500, eos_token_id=501, pad_token_id=501,
    )  # fmt: skip
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config(model)))
    return freeze(TrainConfig, tiny_settings(str(directory)))


def tiny_settings(directory: str) -> ConfigDict:
    config = settings.default(checkpoint=directory)
    with config.unlocked():
        config.prompt_buckets = (24,)
        config.sampler.update(completion_length=16, steps=8, block_length=8)
        config.lora.update(rank=4, dropout=0.0)
        config.model.update(vocab_chunk=128, dtype="float32")
        config.update(prompts_per_iteration=2, group_size=4, microbatch_rows=4)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("rank", [4, 0])
def test_compiled_programs_do_what_the_equations_say(tmp_path, rank):
    """Sampler, scorer and update compiled for this CPU, with adapters and with all parameters trained."""
    config = tiny(tmp_path / "base")
    config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=rank))
    planned = programs.make_plan(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    for name, tolerance in (("sampler", 0.05), ("score", 0.05), ("update", 0.1), ("exact", 0.05)):
        program = planned.programs[name]
        found = cost.program_cost(program.lower().compile().as_text())
        assert found.open_loops == 0
        assert found.flops == pytest.approx(program.flops, rel=tolerance), name


@pytest.mark.slow
def test_programs_of_blocks_do_what_the_equations_say(tmp_path):
    """Blocks of four, whose loops end by what is written; a fifth one has room for prompts that share their last.

    Whatever scores runs a clean copy of each text and a noisy one of its completion.
    """
    config = tiny(tmp_path / "base")
    published = dataclasses.replace(
        hub.architecture("SDAR-4B-Chat"), vocab_size=512, hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2,
        head_size=None, intermediate_size=160, mask_token_id=500, eos_token_id=501, pad_token_id=501,
    )  # fmt: skip
    (tmp_path / "base" / "config.json").write_text(json.dumps(hf_config(published)))
    config = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, block_length=4))
    planned = programs.make_plan(config, make_mesh(MeshConfig(), jax.devices()[:1])).programs
    assert planned["sampler"].loops == (5, 2)
    for name, loops, tolerance in (("sampler", 2, 0.05), ("update", 0, 0.1), ("exact", 0, 0.05)):
        program = planned[name]
        found = cost.program_cost(program.lower().compile().as_text(), open_loops=program.loops)
        assert found.open_loops == loops, name
        assert found.flops == pytest.approx(program.flops, rel=tolerance), name


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def compiler(monkeypatch):
    """This machine's devices as the chips, and programs that take as many bytes as each test says.

    Returns what a test fills: bytes by the first line of a program, and the lines that were asked for.
    """
    sizes = {"arguments": 2 * chips.GIB, "temporary": chips.GIB, "limit": None}

    class Lowered:
        def as_text(self):
            return ""

    def make_plan(config, mesh, original=programs.make_plan):
        found = original(config, mesh)
        sizes["rows"] = config.microbatch_rows
        return found._replace(programs={name: each._replace(lower=Lowered) for name, each in found.programs.items()})

    def compile_program(lowered, topology):
        temporary = sizes["temporary"] * (sizes["rows"] / 4 if sizes["limit"] else 1)
        peak = int(sizes["arguments"] + temporary)
        if sizes["limit"] and peak > sizes["limit"]:
            return Compiled(False, peak)
        return Compiled(True, peak, sizes["arguments"], 0, 0, int(temporary), MODULE)

    monkeypatch.setattr(chips, "devices", lambda topology: jax.devices()[:1])
    for module in (plan, report):
        monkeypatch.setattr(module, "make_plan", make_plan)
    monkeypatch.setattr(report, "compile_program", compile_program)
    return sizes


def config_file(directory):
    """A config file around `tiny`."""
    tiny(directory / "base")
    file = directory / "config.py"
    body = f"def get_config():\n    return tiny_settings({str(directory / 'base')!r})\n"
    file.write_text(f"from test_plan import tiny_settings\n\n\n{body}")
    return file


def test_report_and_table(compiler, tmp_path, capsys):
    """The JSON has what others read, the table stays within 80 columns, and what fits leaves quietly."""
    file = tmp_path / "out" / "plan.json"
    command(plan, "--config", config_file(tmp_path), "--topology", "v5e:1x1", "--json", file, "--top", 1)
    found = json.loads(file.read_text())
    assert found["fits"] and found["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1}
    for name in ("sampler", "score", "update"):
        part = found[name]
        assert part["fits"]
        assert part["peak_bytes"] == 3 * chips.GIB + part["beside_bytes"]
        assert part["hbm_bytes"] == chips.CHIPS["v5e"].hbm_bytes
        assert part["flops"] == part["flops_ratio"] * part["flops_analytic"] > 0
        assert part["seconds_roofline"] == max(part["seconds"].values())
    # The sampler reads no optimizer state, yet it is there.
    assert found["sampler"]["beside_bytes"] >= found["optimizer_bytes"] > 0
    assert found["update"]["beside_bytes"] == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("splash_mha_fwd" in line for line in lines)
    # Of the two movers of HBM bytes the larger, and the only one of the network.
    largest = found["update"]["largest"]
    assert [list(largest[kind]) for kind in ("hbm", "network")] == [["all-gather gather"], ["all-gather gather-start"]]
    assert lines.count("  network 2.867e-05 GB: all-gather gather-start") == 3


def test_what_does_not_fit_is_refused(compiler, tmp_path, capsys):
    """By the compiler, or because of what lives beside the program; the exit code says so."""
    config, file = config_file(tmp_path), tmp_path / "plan.json"
    flags = ("--config", config, "--topology", "v5e:1x1", "--json", file, "--programs", "sampler")
    compiler["limit"] = 2 * chips.GIB
    with pytest.raises(SystemExit) as left:
        command(plan, *flags)
    found = json.loads(file.read_text())
    assert left.value.code == 1
    assert not found["fits"] and not found["sampler"]["fits"] and found["sampler"]["seconds_roofline"] is None
    assert found["sampler"]["peak_bytes"] == 3 * chips.GIB + found["sampler"]["beside_bytes"]
    compiler.update(limit=None, temporary=chips.CHIPS["v5e"].hbm_bytes - 2 * chips.GIB)
    with pytest.raises(SystemExit):
        command(plan, *flags)
    assert not json.loads(file.read_text())["fits"]


def test_table_of_the_pod_configs(monkeypatch, tmp_path, compiler):
    """Every config of a pod is a row that divides its slice; rows that are not there are named."""
    monkeypatch.chdir(ROOT)
    rows = pods.rows()
    for row in rows:
        config = pods.row_config(row)
        shards = chips.parse_topology(row.topology).chips
        assert (
            config.prompts_per_iteration * config.group_size % config.microbatch_rows
            == 0
            == config.microbatch_rows % shards
        )
    where = chips.parse_topology("v5e:1x1")
    found = json.loads(json.dumps(report.report_of(tiny(tmp_path / "base"), where, list(report.USUAL))))
    page = tmp_path / "page.md"
    pods.draw({rows[0].name: found | {"commit": "abc123"}}, page, {"jax": "1", "libtpu": "2"})
    text = page.read_text()
    assert text.count("\n| base, LoRA 4 | v5e:1x1 | 1 | 8, 4 |") == 1
    assert "| yes | `abc123` |" in text
    assert all((f"`{row.name}`" in text) == (row != rows[0]) for row in rows)
    small = pods.line(found | {"commit": "abc123", "weights": "int8", "rollout_parts": 2})
    assert small.startswith("| base, LoRA 4, int8 | v5e:1x1 | 1 | 8 in 2 parts, 4 |")


def test_what_the_compiler_writes_down_of_its_buffers():
    """Donated arguments are outputs too; memory with a colour is on the core itself."""
    buffers = """BufferAssignment:
allocation 0: size 512, thread-local:
allocation 1: size 4096, parameter 0, shape |f32[1024]| at ShapeIndex {}:
allocation 2: size 8192, parameter 1, shape |f32[2048]| at ShapeIndex {}, maybe-live-out:
allocation 3: size 64, output shape is |(f32[2048], f32[16])|, maybe-live-out:
allocation 4: size 100000, preallocated-temp:
 value: <7 fusion @0> (size=4096,offset=0): f32[1024]{0:T(1024)}
allocation 5: size 777, color 1, preallocated-temp:
"""
    found = quick.read_dump(buffers, MODULE)
    assert found == Compiled(True, 4096 + 8192 + 64 + 100512, 4096 + 8192, 8192 + 64, 8192, 100512, MODULE)


def test_search_doubles_what_fits(compiler, tmp_path, capsys):
    """Temporaries grow with the micro-batch: 4 rows take 1 GiB, and 8 rows are all there are."""
    compiler["limit"] = 4.5 * chips.GIB
    command(plan, "--config", config_file(tmp_path), "--topology", "v5e:1x1", "--search", "--programs", "update")
    out = capsys.readouterr().out
    assert "suggestion: --config.mesh.data=1" in out and "--config.microbatch_rows=8" in out
    compiler["limit"] = chips.GIB
    with pytest.raises(SystemExit):
        command(plan, "--config", config_file(tmp_path), "--topology", "v5e:1x1", "--search")
    assert "take a larger slice" in capsys.readouterr().err


def test_bad_flags_name_the_remedy(tmp_path, capsys):
    config = config_file(tmp_path)
    cases = [
        ((), "--topology"),
        (("--topology", "v7:2x2"), "v5p"),
        (("--topology", "v5e:²x1"), "slices have 2 sizes"),
        (("--topology", "v5e:2x4", "--programs", "reward"), "sampler,score,update"),
        *((("--topology", "v5e:2x4", "--mesh", f"fsdp={size}"), "--mesh") for size in ("x", "--1", "²")),
    ]
    if importlib.util.find_spec("libtpu") is None:
        cases.append((("--topology", "v5e:2x4"), "make venv-tpu"))
    for flags, remedy in cases:
        with pytest.raises(SystemExit) as left:
            command(plan, "--config", config, *flags)
        assert left.value.code == 2
        assert remedy in capsys.readouterr().err


def test_a_run_logs_its_seconds_beside_the_plan(tmp_path):
    """Where the plan is the run's; a plan of another run is refused."""
    config = tiny(tmp_path / "base")
    assert planned.read_plan(tmp_path, config) is None
    assert not any(name.startswith("plan/") for name in planned.beside_plan(None, rollout=2.0, update=1.0))
    one = {"peak_bytes": 100, "seconds_roofline": 0.5}
    run = {"method": "gdsd", "lora_rank": 4, "rows": 8, "microbatch_rows": 4}
    (tmp_path / "plan.json").write_text(json.dumps(run | {"sampler": one, "update": one | {"seconds_roofline": None}}))
    metrics = planned.beside_plan(planned.read_plan(tmp_path, config), rollout=2.0, update=1.0)
    assert metrics["plan/sampler_seconds"] == 0.5 and metrics["plan/sampler_share"] == 0.25
    assert metrics["plan/update_peak_bytes"] == 100 and "plan/update_seconds" not in metrics
    with pytest.raises(UserError, match="microbatch_rows"):
        planned.read_plan(tmp_path, dataclasses.replace(config, microbatch_rows=8))


# ------------------------------------------------------------------------------------------------- the real compiler


@pytest.mark.slow
@pytest.mark.libtpu
def test_a_real_program_for_chips_that_are_not_here(tmp_path):
    """LLaDA-8B's scorer on eight chips of v5e: it fits, does what the equations say, attends through the kernel."""
    file = tmp_path / "plan.json"
    flags = ("--topology=v5e:2x4", "--programs=score", f"--json={file}")
    # Not the precision of the parity tests.
    with jax.default_matmul_precision("default"):
        command(plan, f"--config={ROOT}/configs/llada_8b_pod.py:v5e-8_countdown", *flags)
    found = json.loads(file.read_text())["score"]
    assert found["fits"] and found["peak_bytes"] < found["hbm_bytes"]
    assert found["flops_ratio"] == pytest.approx(1, abs=0.05)
    assert found["kernels"] == {"splash_mha_fwd_segmented_no_residuals": 32}
    assert found["collectives"]


@pytest.mark.slow
@pytest.mark.libtpu
def test_a_quick_plan_counts_what_a_whole_compilation_counts(tmp_path):
    """Only the memory differs: the machine code is not in it, and gaps between temporary arrays count once."""
    config, where = tiny(tmp_path / "base"), chips.parse_topology("v5e:2x4")
    config = dataclasses.replace(config, group_size=8, microbatch_rows=8)
    whole, fast = (report.report_of(config, where, ["score", "update"], quick=kind) for kind in (False, True))
    for name in ("score", "update"):
        one, other = whole[name], fast[name]
        same = ("flops", "bytes_accessed", "collectives", "kernels", "argument_bytes", "output_bytes", "seconds")
        assert {key: one[key] for key in same} == {key: other[key] for key in same}
        assert 0 < other["temporary_bytes"] <= one["temporary_bytes"]
        assert other["peak_bytes"] < one["peak_bytes"]


@pytest.mark.slow
@pytest.mark.libtpu
def test_no_product_of_a_layer_passes_shards_around():
    """Two layers of the real size on sixteen chips: each device's weights travel once, as gathers, and nothing else.

    Cut along the contracted axis each product would be a loop of collective-permutes that adds in bfloat16.
    """
    mesh = make_mesh(MeshConfig(1, 16, 1), chips.devices(chips.parse_topology("v5p:2x2x4")))
    ids = dict.fromkeys(("mask_token_id", "eos_token_id", "pad_token_id"), 1)
    model = dataclasses.replace(LLADA_8B, num_layers=2, vocab_size=1024, dtype="bfloat16", **ids)
    base = jax.tree.map(lambda x, a: programs.place(mesh, x, a), programs.base_shapes(model), logical_axes(model))
    tokens = programs.place(mesh, jax.ShapeDtypeStruct((320, 656), jnp.int32), ("rows", "tokens"))
    # Not the precision of the parity tests.
    with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
        run = jax.jit(lambda base, tokens: hidden_states(model, base, None, tokens))
        found = cost.program_cost(compile_program(run.lower(base, tokens), "v5p:2x2x4").text)
    assert set(found.sent) == {"all-gather"}
    layers = sum(math.prod(x.shape) * 2 for x in jax.tree.leaves(base["layers"]))
    assert found.sent["all-gather"] == pytest.approx(layers * 15 / 16, rel=0.05)
    assert found.hbm < 2 * 400e9 / 32


@pytest.mark.slow
@pytest.mark.libtpu
def test_a_mesh_may_cut_a_row_of_chips():
    """Sizes need not be products of those of the slice: 16 x 4 of 8 x 8 chips, each of them once."""
    devices = chips.devices(chips.parse_topology("v5e:8x8"))
    mesh = make_mesh(MeshConfig(1, 16, 4), devices)
    assert mesh.devices.shape == (1, 16, 4)
    assert set(mesh.devices.flat) == set(devices)


@pytest.mark.slow
@pytest.mark.libtpu
def test_a_slice_may_be_smaller_than_a_host():
    for name in ("v5e:1x1", "v6e:1x1", "v5e:2x2"):
        where = chips.parse_topology(name)
        assert len(chips.devices(where)) == where.chips


@pytest.mark.slow
@pytest.mark.libtpu
def test_the_real_compiler_refuses_what_does_not_fit():
    """And says by how much."""
    where = chips.parse_topology("v5e:2x4")
    mesh = make_mesh(MeshConfig(), chips.devices(where))
    whole = jax.ShapeDtypeStruct((60 * 2**20, 256), jnp.float32, sharding=sharding.replicated(mesh))
    found = compile_program(jax.jit(lambda x: jnp.cumsum(x @ x[:256], axis=0)).lower(whole), where.name)
    assert not found.fits
    assert found.peak_bytes > where.chip.hbm_bytes
