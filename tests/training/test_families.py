"""One small run in the format of each kind of family: it is planned, trains, and resumes as if nothing had happened.

The families that are left out compute what another of them or LLaDA computes, under other names.
"""

import json
import runpy
from pathlib import Path

import jax
import pytest
import tiny_run

from gdsd_jax import train
from gdsd_jax.config import TrainConfig, freeze
from gdsd_jax.families import FAMILIES
from gdsd_jax.hub import tiny
from gdsd_jax.planning import programs
from gdsd_jax.planning.report import USUAL
from gdsd_jax.runtime.sharding import MeshConfig, make_mesh

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]
KINDS = ("a2d-qwen3", "dream", "fast_dllm_qwen", "illada", "sdar")


def make(directory: Path, family: str, iterations: int = 2) -> TrainConfig:
    """Makes a checkpoint if there is none, and returns a run on it with the sampler of the family's authors."""
    block = 4 if "block_size" in FAMILIES[family].quirks else None
    if not (directory / "base").exists():
        sizes = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 64, "max_length": 64}
        tiny.build(directory / "base", family=family, block_size=block, **sizes)
        (directory / "config.py").write_text(tiny_run.CONFIG.format(checkpoint=str(directory / "base")))
    config = runpy.run_path(str(directory / "config.py"))["get_config"]()
    with config.unlocked():
        config.sampler.update(**FAMILIES[family].sampler | {"block_length": 4})
        config.iterations = iterations
    return freeze(TrainConfig, config)


def written(workdir: Path) -> list[dict]:
    """Returns the metrics of each iteration, without what the clock measured and what only a last iteration has."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "eval/"))} for line in lines]


@pytest.mark.parametrize("family", KINDS)
def test_a_resumed_run_is_the_whole_run(family, tmp_path):
    train.train(make(tmp_path, family), tmp_path / "whole")
    for iterations in (1, 2):
        train.train(make(tmp_path, family, iterations), tmp_path / "parts")
    whole, parts = written(tmp_path / "whole"), written(tmp_path / "parts")
    assert [line["step"] for line in whole] == [1, 2] and whole[1]["policy/kl"] != 0
    assert parts == whole
    completions = [(tmp_path / name / "completions.jsonl").read_bytes() for name in ("whole", "parts")]
    assert completions[0] == completions[1]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_program_of_a_run_can_be_planned(family, tmp_path):
    plan = programs.make_plan(make(tmp_path, family), make_mesh(MeshConfig(), jax.devices()[:1]))
    for name in USUAL:
        program = plan.programs[name]
        assert program.flops > 0 and "main" in program.lower().as_text(), name
