"""Every method that was recorded, against numbers of the original PyTorch code: scores, losses, every named gradient.

Tolerances are those of the recording: scores 5e-4 absolute, losses 1e-4 relative, gradients 1e-4 of the global norm.
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdsd_jax import hub
from gdsd_jax.diffusion import masking
from gdsd_jax.diffusion.scoring import Views, read_views
from gdsd_jax.hub import names
from gdsd_jax.methods import Batch, Scores, build, common, loss_on_views

ROOT = Path(__file__).parents[1] / "golden" / "rl"
FAMILIES = ("llada", "dream")
WHOLE_COMPLETION = ("d1", "wd1", "spg")  # recorded with prompts and completions of their own

# Half the compile time, and programs this small run as fast.
QUICK = {"xla_backend_optimization_level": 0}
# Not d1's `metric_clip_ratio`: its code counts the tokens on which the clip would loosen the bound, not those it holds.
LOGGED = {"metric_clip_ratio_region_mean": "clipped", "metric_kl": "kl"}


def method_of(case: dict) -> tuple[str, dict]:
    """Our method and settings for a recorded case."""
    clip = {"eps_low": case["epsilon_low"], "eps_high": case["epsilon_high"]} if "epsilon_low" in case else {}
    if case["algo"] == "gdsd":
        return "gdsd", {**clip, "psi": case["psi"], "beta": case["beta"], "weighting": "plain"}
    if case["algo"] == "tlccheckout" or case.get("centering") == "bar_detached_center":
        # Centring by a constant changes neither the score's gradient nor the loss: these are ELBO-weighted GDSD.
        return "gdsd", {**clip, "psi": case["psi"], "beta": case["beta"], "weighting": "elbo"}
    if case["algo"] == "gdsd_tlc_new":
        return "gdsd_tlc", {**clip, "psi": case["psi"], "beta": case["beta"], "top_k": case["topk"]}
    if case["algo"] == "espo":
        return "espo", {**clip, "beta": case["beta"]}
    if case["algo"] == "d1":
        return "diffu_grpo", {"eps_low": case["epsilon"], "eps_high": case["epsilon"], "beta": case["beta"]}
    if case["algo"] == "wd1":
        return "wd1", {"positive_only": case["name"] == "wd1_pos_only"}
    settings = {"negative": case["logp_estimation"], "eubo_beta": case["eubo_beta"], "mix_weight": case["mix_weight"]}
    return "spg", settings


CASES = {
    (family, name): {**case, "name": name}
    for family in FAMILIES
    for name, case in json.loads((ROOT / family / "cases.json").read_text())["cases"].items()
}


class Recorded(NamedTuple):
    """One case: what goes in, what was fed as old and reference scores, and what must come out."""

    inputs: dict
    masked: np.ndarray
    old: np.ndarray | None
    ref: np.ndarray | None
    scores: np.ndarray
    numbers: dict


@functools.cache
def model(family: str) -> tuple:
    return hub.load_checkpoint(ROOT.parent / f"{family}_tiny")


@functools.cache
def arrays(file: Path) -> dict:
    return dict(np.load(file))


@functools.cache
def recorded(family: str, name: str) -> Recorded:
    case, mask_id = CASES[family, name], model(family)[0].mask_token_id
    numbers = arrays(ROOT / family / f"loss_{name}.npz")
    old, ref = numbers.get("old_logps"), numbers.get("ref_logps")
    if case["algo"] in WHOLE_COMPLETION:
        inputs = arrays(ROOT / family / "inputs_d1_wd1_spg.npz")
        if case["algo"] == "spg":
            noisy, scores = numbers["noisy_batch"].swapaxes(0, 1), numbers["per_seq_logps"]
        else:
            noisy, scores = numbers["perturbed_seq"][None], numbers["per_token_logps"]
            inputs = {key: value for key, value in inputs.items() if key != "prompt_mask"}
        return Recorded(inputs, noisy == mask_id, old, ref, scores, numbers)
    inputs, iteration = arrays(ROOT / family / "inputs.npz"), case["iteration"]
    estimates = {key: value[iteration] for key, value in arrays(ROOT / family / "estimates.npz").items()}
    estimate = case["estimate"]
    if case.get("centering") == "bar_detached_center":
        # Recorded on the centred scale; the plain score differs from it by the (detached) centre, so does its old.
        estimate = "tlc_checkout"
        old = None if old is None else old + estimates["tlc_checkout"] - estimates["tlc_bar"]
    return Recorded(inputs, inputs["perturbed_seq"][iteration] == mask_id, old, ref, estimates[estimate], numbers)


def batch_of(inputs: dict) -> Batch:
    tokens = np.concatenate([inputs["prompt_ids"], inputs["completion_ids"]], axis=1)
    prompt_mask = jnp.asarray(inputs["prompt_mask"], bool) if "prompt_mask" in inputs else None
    completion_mask = jnp.asarray(inputs.get("completion_mask", np.ones(inputs["completion_ids"].shape)), jnp.float32)
    advantages = jnp.asarray(inputs["advantages"])
    return Batch(jnp.asarray(tokens), prompt_mask, completion_mask, advantages=advantages, group_size=len(tokens))


def seen(views: Views, batch: Batch) -> tuple[Views, Batch]:
    """Returns views whose passes are read one by one, filled up to three, so that one program reads all cases."""
    missing = 3 - len(views.sources)
    if any(len(source) > 1 for source in views.sources):
        return views, batch
    masked, weights = (jnp.concatenate([x, *[x[:1]] * missing]) for x in (views.masked, views.weights))
    everything = jnp.ones((batch.tokens.shape[0], batch.prompt_length), bool)
    attended = everything if batch.prompt_mask is None else batch.prompt_mask
    return Views(masked, weights, ((0,), (1,), (2,))), batch.replace(prompt_mask=attended)


@functools.cache
def reader(family: str, reads: tuple) -> tuple:
    """Reads of given views, in order, and their pull-back to the base: compiled once for all cases of these passes."""
    config, _ = model(family)

    def read(base, views, batch):
        values = read_views(config, base, None, batch.tokens, views, reads, prompt_mask=batch.prompt_mask)
        return [values[name] for name in reads]

    def pull_back(base, views, batch, cotangent):
        return jax.vjp(lambda base: read(base, views, batch), base)[1](cotangent)[0]

    return jax.jit(read, compiler_options=QUICK), jax.jit(pull_back, compiler_options=QUICK)


# Families differ in what they score, methods in what they do with it: few cases show both in the fast tier.
TWICE = ("gdsd_unsaturated", "tlc_bar_top8_mixed_kl", "espo_mixed_kl")
# Variants of a method of which the fast tier has other cases.
VARIANTS = (
    "tlc_bar_top32_unsaturated", "tlc_bar_top32_mixed_kl", "tlc_bar_top8_unsaturated", "tlc_bar_unsaturated_kl",
    "spg_all_mix", "spg_mix_beta2_w03_t3",
)  # fmt: skip


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(
            family,
            name,
            marks=[] if name in TWICE or (family == "llada" and name not in VARIANTS) else [pytest.mark.slow],
        )
        for family, name in CASES
    ],
)
def test_scores_losses_and_gradients(family, name):
    case, given = CASES[family, name], recorded(family, name)
    config, base = model(family)
    method_name, settings = method_of(case)
    method, batch = build(method_name, **settings), batch_of(given.inputs)
    views = method.views(jnp.asarray(given.masked), batch)
    # Plain and centred scores are read by the same program.
    top_k = tuple(r for r in method.reads if isinstance(r, tuple))
    reads = ("log_prob", *top_k) if top_k else ("log_prob", "centred")
    read, pull_back = reader(family, reads)
    old, ref = (None if x is None else Scores(jnp.asarray(x), jnp.asarray(x)) for x in (given.old, given.ref))
    constants = method.prepare(batch, old, ref)

    def loss_of(values):
        values = (value[: len(views.sources)] for value in values)
        new = method.score(dict(zip(reads, values, strict=True)), views)
        losses, metrics = method.objective(new, constants)
        return jnp.sum(sum(losses.values())), (new.guided, metrics)

    passes = seen(views, batch)
    values = read(base, *passes)
    (loss, (scores, metrics)), cotangent = jax.value_and_grad(loss_of, has_aux=True)(values)
    gradient = pull_back(base, *passes, cotangent)

    np.testing.assert_allclose(scores, given.scores, atol=5e-4)
    np.testing.assert_allclose(loss, case["loss"], rtol=1e-4, atol=1e-5)
    for theirs, ours in LOGGED.items():
        if theirs in given.numbers:
            np.testing.assert_allclose(jnp.mean(metrics[ours]), given.numbers[theirs], rtol=1e-4, atol=1e-5)

    if family == "dream":
        # The reference never updates the embedding row of its padding id.
        gradient["embedding"] = gradient["embedding"].at[config.pad_token_id].set(0.0)
    slots = names.slots(config)
    tolerance = 1e-4 * case["global_grad_norm"] + 1e-12

    def stored(name: str) -> np.ndarray:
        slot = slots[name]
        value = names.at(gradient, slot.path)
        return np.asarray(value if slot.layer is None else value[slot.layer])

    for name_, norm in case["per_parameter_grad_norm"].items():
        np.testing.assert_allclose(np.linalg.norm(stored(name_)), norm, atol=tolerance, err_msg=name_)
    numbers = given.numbers
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


@pytest.mark.parametrize(("family", "name"), [("dream", "tlc_bar_top8_mixed_kl"), ("llada", "spg_mix")])
def test_the_public_entry_composes_the_same_pieces(family, name):
    case, given = CASES[family, name], recorded(family, name)
    method, settings = method_of(case)
    config, base = model(family)

    def loss(base):
        return loss_on_views(
            method,
            config,
            base,
            None,
            prompts=jnp.asarray(given.inputs["prompt_ids"]),
            completions=jnp.asarray(given.inputs["completion_ids"]),
            masked=jnp.asarray(given.masked),
            advantages=jnp.asarray(given.inputs["advantages"]),
            old=given.old,
            ref=given.ref,
            prompt_mask=given.inputs.get("prompt_mask"),
            completion_mask=given.inputs.get("completion_mask"),
            **settings,
        )

    (value, scores), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)(base)
    np.testing.assert_allclose(value, case["loss"], rtol=1e-4)
    np.testing.assert_allclose(scores, given.scores, atol=5e-4)
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
