"""GDSD and TLC against numbers of the original PyTorch code: scores, losses and every named gradient.

Tolerances are those of the recording: scores 5e-4 absolute, losses 1e-4 relative, gradients 1e-4 of the global norm.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdsd_jax import hub
from gdsd_jax.diffusion import masking
from gdsd_jax.diffusion.scoring import read_views
from gdsd_jax.hub import names
from gdsd_jax.methods import Batch, Method, Scores, build, common, loss_on_views

ROOT = Path(__file__).parent / "golden" / "rl"
FAMILIES = ("llada", "dream")


def method_of(case: dict) -> tuple[str, dict] | None:
    """Our method and settings for a recorded case, None where the case is of another method."""
    clip = {"eps_low": case["epsilon_low"], "eps_high": case["epsilon_high"]} if "epsilon_low" in case else {}
    if case["algo"] == "gdsd":
        return "gdsd", {**clip, "psi": case["psi"], "beta": case["beta"], "weighting": "plain"}
    if case["algo"] == "tlccheckout" or case.get("centering") == "bar_detached_center":
        # Centring by a constant changes neither the score's gradient nor the loss: these are ELBO-weighted GDSD.
        return "gdsd", {**clip, "psi": case["psi"], "beta": case["beta"], "weighting": "elbo"}
    if case["algo"] == "gdsd_tlc_new":
        return "gdsd_tlc", {**clip, "psi": case["psi"], "beta": case["beta"], "top_k": case["topk"]}
    return None


CASES = [
    (family, name)
    for family in FAMILIES
    for name, case in json.loads((ROOT / family / "cases.json").read_text())["cases"].items()
    if method_of(case)
]


@functools.cache
def inputs(family: str) -> tuple:
    config, base = hub.load_checkpoint(ROOT.parent / f"{family}_tiny")
    recorded = dict(np.load(ROOT / family / "inputs.npz"))
    masked = recorded["perturbed_seq"] == config.mask_token_id
    return config, base, recorded, masked


@functools.cache
def scorer(family: str, method: Method) -> tuple:
    """Scores on given masks, and their pull-back to the base: compiled once for all cases with these reads."""
    config, _, recorded, _ = inputs(family)
    rows = batch_of(recorded)

    def scores(base, masked):
        views = method.views(masked, rows)
        return method.score(read_views(config, base, None, rows.tokens, views, method.reads), views)

    def pull_back(base, masked, cotangent):
        return jax.vjp(lambda base: scores(base, masked), base)[1](cotangent)[0]

    return jax.jit(scores), jax.jit(pull_back)


def batch_of(recorded: dict) -> Batch:
    tokens = np.concatenate([recorded["prompt_ids"], recorded["completion_ids"]], axis=1)
    ones = jnp.ones(recorded["completion_ids"].shape)
    return Batch(jnp.asarray(tokens), None, ones, advantages=jnp.asarray(recorded["advantages"]), group_size=len(tokens))


@functools.cache
def scoring_method(name: str, weighting: str | None, top_k: int | None) -> Method:
    """A method value shared by all cases with the same reads and weights, so that its scorer is shared too."""
    settings = {"beta": 1.0}
    settings |= {} if weighting is None else {"weighting": weighting}
    settings |= {} if name == "gdsd" else {"top_k": top_k}
    return build(name, **settings)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_scores_losses_and_gradients(family, name):
    case = json.loads((ROOT / family / "cases.json").read_text())["cases"][name]
    method_name, settings = method_of(case)
    config, base, recorded, masked = inputs(family)
    masked = jnp.asarray(masked[case["iteration"]])
    numbers = dict(np.load(ROOT / family / f"loss_{name}.npz"))
    given = {short: jnp.asarray(numbers[long]) for short, long in (("old", "old_logps"), ("ref", "ref_logps")) if long in numbers}
    estimates = dict(np.load(ROOT / family / "estimates.npz"))
    plain, centred = (estimates[k][case["iteration"]] for k in ("tlc_checkout", "tlc_bar"))
    if case.get("centering") == "bar_detached_center" and "old" in given:
        # Recorded on the centred scale; the plain score differs from it by the (detached) centre, so does its old.
        given["old"] = given["old"] + plain - centred

    shared = scoring_method(method_name, settings.get("weighting"), settings.get("top_k"))
    forward, pull_back = scorer(family, shared)
    new = forward(base, masked)
    method = build(method_name, **settings)
    old, ref = (Scores(given[k], given[k]) if k in given else None for k in ("old", "ref"))
    constants = method.prepare(batch_of(recorded), old, ref)
    loss, cotangent = jax.value_and_grad(lambda scores: jnp.sum(method.objective(scores, constants)[0]))(new)
    gradient = pull_back(base, masked, cotangent)
    scores = new.guided

    estimate = case["estimate"] if case.get("centering") != "bar_detached_center" else "tlc_checkout"
    expected = estimates[estimate][case["iteration"]]
    np.testing.assert_allclose(scores, expected, atol=5e-4)
    np.testing.assert_allclose(loss, case["loss"], rtol=1e-4, atol=1e-5)

    if family == "dream":
        # The reference never updates the embedding row of its padding id.
        gradient["embedding"] = gradient["embedding"].at[config.pad_token_id].set(0.0)
    slots = names.slots(config)
    tolerance = 1e-4 * case["global_grad_norm"] + 1e-12

    def stored(name: str) -> np.ndarray:
        slot = slots[name]
        value = names.at(gradient, slot.path)
        value = value if slot.layer is None else value[slot.layer]
        return np.asarray(value.T if slot.transposed else value)

    for name_, norm in case["per_parameter_grad_norm"].items():
        np.testing.assert_allclose(np.linalg.norm(stored(name_)), norm, atol=tolerance, err_msg=name_)
    named = [key for key in numbers if key.startswith("grad:")]
    for key in named:
        tensor = stored(key.removeprefix("grad:").removesuffix("[:8]"))
        rows = tensor[:8] if key.endswith("[:8]") else tensor
        np.testing.assert_allclose(rows, numbers[key], atol=tolerance, err_msg=key)
    if case["global_grad_norm"]:
        assert named
        key = next(key for key in numbers if key.startswith("grad_rows:"))
        rows = stored(key.removeprefix("grad_rows:"))[numbers["grad_row_ids"]]
        np.testing.assert_allclose(rows, numbers[key], atol=tolerance)


@pytest.mark.parametrize(("family", "name"), [("llada", "gdsd_mixed_kl"), ("dream", "tlc_bar_top8_mixed_kl")])
def test_the_public_entry_composes_the_same_pieces(family, name):
    case = json.loads((ROOT / family / "cases.json").read_text())["cases"][name]
    method, settings = method_of(case)
    config, base, recorded, masked = inputs(family)
    numbers = dict(np.load(ROOT / family / f"loss_{name}.npz"))

    def loss(base):
        return loss_on_views(
            method,
            config,
            base,
            None,
            prompts=jnp.asarray(recorded["prompt_ids"]),
            completions=jnp.asarray(recorded["completion_ids"]),
            masked=jnp.asarray(masked[case["iteration"]]),
            advantages=jnp.asarray(recorded["advantages"]),
            old=jnp.asarray(numbers["old_logps"]),
            ref=jnp.asarray(numbers["ref_logps"]),
            **settings,
        )

    (value, scores), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(base)
    np.testing.assert_allclose(value, case["loss"], rtol=1e-4)
    expected = dict(np.load(ROOT / family / "estimates.npz"))[case["estimate"]][case["iteration"]]
    np.testing.assert_allclose(scores, expected, atol=5e-4)
    del gradient["embedding"]
    squares = sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(gradient))
    np.testing.assert_allclose(squares**0.5, case["global_grad_norm_without_embedding"], rtol=1e-4)


@pytest.mark.parametrize("row", json.loads((ROOT / "advantages_loo.json").read_text()))
def test_leave_one_out_advantages(row):
    rewards = jnp.asarray(row["rewards"], jnp.float32)
    advantages = common.leave_one_out(rewards, row["num_generations"], scale=row["scale_rewards"])
    np.testing.assert_allclose(advantages, row["advantages"], rtol=1e-5, atol=1e-5)


def test_stratified_mask_counts():
    """Exact, but on rows whose value is exactly a half: float noise may pick either neighbour there."""
    for row in json.loads((ROOT / "forward_process_counts.json").read_text())["rows"]:
        counts = np.asarray(masking.stratified_counts(row["k"], row["b"], row["L"]))
        difference = (counts - np.asarray(row["x"])) % (row["L"] + 1)
        half = np.isin(np.arange(row["b"]), row["exact_half_rows"])
        assert np.all(difference[~half] == 0), row
        assert np.all(np.isin(difference[half], (0, 1, row["L"]))), row
