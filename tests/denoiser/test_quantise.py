"""Weights in 8 bits: rounding, products and gradients, loading, meshes, and runs that resume and export."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import build, command

from gdsd_jax import evaluate, export, hub, train
from gdsd_jax.config import LoRAConfig, TrainConfig, default, freeze
from gdsd_jax.denoiser import TARGETS, DenoiserConfig, denoise, init_base, init_lora, logical_axes
from gdsd_jax.denoiser.quantise import LARGEST, quantise, quantised
from gdsd_jax.hub import outgoing
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.sharding import MeshConfig, make_mesh

STORED = DenoiserConfig(
    family="dream", vocab_size=40, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48,
    max_length=64, rope_theta=10000.0, rms_norm_eps=1e-5, qkv_bias=True, tied_head=False, next_token_logits=True,
    mask_token_id=3, eos_token_id=1, pad_token_id=0,
)  # fmt: skip
SMALL = dataclasses.replace(STORED, weights="int8")


def dequantise(weight, scale):
    return weight.astype(jnp.float32) * scale[..., None]


def widened(base):
    """Returns a quantised base with its rounded matrices in float32."""
    made = {}
    for name, module in base["layers"].items():
        if isinstance(module, dict):
            module = {key: value for key, value in module.items() if key != "scale"} | {
                "weight": dequantise(module["weight"], module["scale"])
            }
        made[name] = module
    return base | {"layers": made}


def test_entries_are_off_by_half_a_scale_at_most():
    weight = jax.random.normal(jax.random.key(0), (3, 5, 16)) * jnp.arange(5)[:, None]
    small, scale = quantise(weight)
    assert small.dtype == jnp.int8 and scale.shape == (3, 5) and scale.dtype == jnp.float32
    assert jnp.all(jnp.abs(dequantise(small, scale) - weight) <= scale[..., None] * 0.5001)
    # The largest entry of a channel is exact, and a channel of zeros stays one.
    np.testing.assert_array_equal(jnp.max(jnp.abs(small), axis=2)[:, 1:], LARGEST)
    np.testing.assert_array_equal(small[:, 0], 0)
    again, same = quantise(dequantise(small, scale))
    np.testing.assert_array_equal(again, small)
    np.testing.assert_allclose(same, scale, rtol=1e-6)


@pytest.mark.slow
def test_layers_and_gradients_are_those_of_the_rounded_matrices():
    base = init_base(SMALL, jax.random.key(0))
    wide = widened(base)
    jax.tree.map(np.testing.assert_array_equal, base, quantised(init_base(STORED, jax.random.key(0))))
    assert jax.tree.structure(logical_axes(SMALL), is_leaf=lambda x: isinstance(x, tuple)) == jax.tree.structure(base)
    lora = init_lora(STORED, jax.random.key(1), rank=2, alpha=4.0, targets=TARGETS)
    lora = jax.tree.map(lambda x: x + 0.01, lora)
    tokens = jax.random.randint(jax.random.key(2), (2, 9), 4, 40)

    loss = lambda lora, config, base: jnp.var(denoise(config, base, lora, tokens))  # noqa: E731
    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    pairs = [(dataclasses.replace(c, remat="dots"), b) for c, b in ((SMALL, base), (STORED, wide))]
    (one, of_one), (two, of_two) = (run(lora, *pair) for pair in pairs)
    np.testing.assert_allclose(one, two, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), of_one, of_two)


def test_loaded_matrices_are_rounded_and_nothing_else(tmp_path):
    base = init_base(STORED, jax.random.key(0))
    hub.export_checkpoint(tmp_path / "base", STORED, base)
    for mesh in (None, make_mesh(MeshConfig(), jax.devices()[:1])):
        config, found = hub.load_checkpoint(tmp_path / "base", mesh=mesh, weights="int8")
        assert config.weights == "int8"
        jax.tree.map(np.testing.assert_array_equal, found, quantised(base))
    with pytest.raises(UserError, match="scale"):
        outgoing.checkpoint_tensors(config, found, None, None)


def test_training_all_parameters_in_8_bits_is_refused():
    config = freeze(TrainConfig, default())
    model = dataclasses.replace(config.model, weights="int8")
    assert dataclasses.replace(config, model=model).model.weights == "int8"
    with pytest.raises(UserError, match="config.lora.rank"):
        dataclasses.replace(config, model=model, lora=LoRAConfig(rank=0))
    with pytest.raises(UserError, match="config.model.weights"):
        dataclasses.replace(STORED, weights="int4")


SHARDED = """
import jax, numpy as np
from test_quantise import SMALL
from gdsd_jax.denoiser import TARGETS, denoise, init_base, init_lora, logical_axes
from gdsd_jax.runtime.sharding import MeshConfig, make_mesh, shardings

base, tokens = init_base(SMALL, jax.random.key(0)), jax.random.randint(jax.random.key(2), (8, 9), 4, 40)
lora = jax.tree.map(
    lambda x: x + 0.01, init_lora(SMALL, jax.random.key(1), rank=2, alpha=4.0, targets=TARGETS)
)

@jax.jit
def run(lora, base):
    return jax.value_and_grad(lambda lora: denoise(SMALL, base, lora, tokens).var())(lora)

alone = jax.device_get(run(lora, base))
for sizes in ((1, 8, 1), (2, 2, 2)):
    mesh = make_mesh(MeshConfig(*sizes))
    placed = jax.device_put(base, shardings(mesh, logical_axes(SMALL), base))
    assert len(placed["layers"]["q"]["weight"].sharding.device_set) == 8
    with jax.set_mesh(mesh):
        spread = jax.device_get(run(lora, placed))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), alone, spread)
print("equal")
"""


@pytest.mark.slow
def test_eight_devices_compute_what_one_does():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    here = Path(__file__).parent
    environment["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent), environment["PYTHONPATH"]])
    found = subprocess.run([sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True)
    assert found.stdout.endswith("equal\n"), found.stderr[-3000:]


@pytest.mark.slow
def test_a_run_resumes_bit_by_bit_and_merges_onto_the_stored_weights(tmp_path, capsys):
    file = build(tmp_path)
    run = ["--config", file, "--config.model.weights=int8"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command(train, *run, "--workdir", whole)
    for iterations in (1, 2):
        command(train, *run, "--workdir", parts, f"--config.iterations={iterations}")
    for workdir in (whole, parts):
        command(export, *run, "--workdir", workdir, "--output", workdir / "out")
    assert "note:" not in capsys.readouterr().err
    command(evaluate, *run[:2], "--workdir", whole, "--count", 2)
    assert "was trained with config.model.weights=int8, not stored" in capsys.readouterr().err
    command(evaluate, *run, "--workdir", whole, "--count", 2)
    assert "note:" not in capsys.readouterr().err
    files = [workdir / "out" / "adapter" / "adapter_model.safetensors" for workdir in (whole, parts)]
    assert files[0].read_bytes() == files[1].read_bytes()
    model, base = hub.load_checkpoint(tmp_path / "base")
    lora = hub.load_adapter(whole / "out" / "adapter", model)
    _, merged = hub.load_checkpoint(whole / "out" / "merged")
    scale = lora.alpha / lora.rank
    for name, weight in ((name, base["layers"][name]["weight"]) for name in TARGETS):
        factors = lora.weights["layers"].get(name)
        added = 0 if factors is None else scale * (np.asarray(factors["a"]) @ np.asarray(factors["b"])).swapaxes(1, 2)
        np.testing.assert_allclose(merged["layers"][name]["weight"], weight + added, atol=1e-6)
    changed = [float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(lora.weights)]
    assert min(changed) > 0
