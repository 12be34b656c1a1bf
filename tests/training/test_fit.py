"""Sizes chosen from memory: near the compiler's figures where memory is short, and never over what the config sets."""

import dataclasses
import json
from pathlib import Path

import pytest

from gdsd_jax import hub
from gdsd_jax.config import TrainConfig, freeze
from gdsd_jax.config.read import config_module
from gdsd_jax.methods import build
from gdsd_jax.planning import chips
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.training import fit
from gdsd_jax.training.fit import Place, fitted
from gdsd_jax.training.setup import with_compute

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30


def recipe(model: str):
    config = config_module(ROOT / "configs" / f"{model}_pod.py").get_config("v5e-8_countdown")
    config = freeze(TrainConfig, config)
    return config, with_compute(hub.architecture(config.checkpoint), config.model)


def opened(config: TrainConfig, **compute) -> TrainConfig:
    """The config with all sizes left to memory."""
    model = dataclasses.replace(config.model, remat="auto", **compute)
    return dataclasses.replace(config, rollout_rows=None, microbatch_rows=None, model=model)


# Peak bytes of sampler and update on v5e:2x4, from whole compilations by libtpu 0.0.42.1 at commit 9f188ce.
WHOLE = {"llada_8b": (9030293520, 8145213952), "dream_7b": (9142596112, 8429518336)}


@pytest.mark.parametrize("model", WHOLE)
def test_estimates_come_near_the_compiler(model):
    """On the slice whose memory is short. The table of plans, made without machine code, bounds them from below."""
    config, sizes = recipe(model)
    report = json.loads((ROOT / "docs" / "pods_plan.json").read_text())[f"{model}_pod:v5e-8_countdown"]
    place = Place(report["sampler"]["hbm_bytes"], *report["mesh"].values(), kernel=True)
    method = build(config.method, **config.method_settings)
    estimates = fit.Sizes(config, sizes, fit.views_of(config, method), place)
    sampler = estimates.sampler(report.get("rollout_rows", report["rows"]))
    update = estimates.update(report["microbatch_rows"], report.get("remat", "full"))
    for estimate, name, whole in zip((sampler, update), ("sampler", "update"), WHOLE[model], strict=True):
        assert 0.85 < estimate / whole < 1.35
        assert estimate > report[name]["peak_bytes"]


def test_the_fastest_that_fits_is_taken():
    config, sizes = recipe("llada_8b")
    method = build(config.method, **config.method_settings)
    free, found = opened(config), []
    for memory in (8, 16, 32, 96, 400):
        place = Place(memory * GIB, 1, 8, 1, kernel=True)
        chosen = fitted(free, sizes, method, place)
        estimates = fit.Sizes(chosen, sizes, fit.views_of(chosen, method), place)
        part = chosen.rollout_rows or 320
        found.append((-fit.POLICIES.index(chosen.model.remat), part))
        assert 320 % part == 0 == part % 8 and 320 % chosen.microbatch_rows == 0 == chosen.microbatch_rows % 8
        if memory >= 16:
            assert estimates.fits(estimates.sampler(part))
            assert estimates.fits(estimates.update(chosen.microbatch_rows, chosen.model.remat))
    # More memory never means more recomputation or smaller parts, and the two ends differ.
    assert found == sorted(found) and found[0][0] < found[-1][0] and found[0][1] < 320 == found[-1][1]
    assert chosen.rollout_rows is None and chosen.model.remat == "none"


def test_what_is_set_stays_and_int8_makes_room():
    config, sizes = recipe("llada_8b")
    method = build(config.method, **config.method_settings)
    one = Place(chips.CHIPS["v5e"].hbm_bytes, 1, 1, 1, kernel=True)
    kept = dataclasses.replace(config, rollout_rows=64, microbatch_rows=16)
    assert fitted(kept, sizes, method, one) is kept
    small = opened(config, weights="int8")
    assert fitted(dataclasses.replace(small, microbatch_rows=32), sizes, method, one).microbatch_rows == 32
    resident = [fit.Sizes(each, sizes, 4, one).resident() for each in (config, small)]
    layers = 32 * sum(i * o for i, o in fit.target_shapes(sizes).values())
    assert resident[0] - resident[1] == layers
    with pytest.raises(UserError, match="config.mesh"):
        fitted(small, sizes, method, Place(GIB, 7, 1, 1, kernel=True))


@pytest.mark.parametrize(("name", "moments"), [("optax:adamw", 2), ("optax:lion", 1), ("optax.contrib:muon", 1)])
def test_moments_of_the_optimizer_are_counted(name, moments):
    """Optimizers that tell parameters apart by name or shape included."""
    config, sizes = recipe("llada_8b")
    one = Place(GIB, 1, 1, 1, kernel=True)
    of = lambda name: fit.Sizes(  # noqa: E731
        dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, name=name)), sizes, 4, one
    ).resident()
    trained = 32 * config.lora.rank * sum(sum(fit.target_shapes(sizes)[target]) for target in config.lora.targets)
    assert of(name) - of("optax:sgd") == 4 * trained * moments
