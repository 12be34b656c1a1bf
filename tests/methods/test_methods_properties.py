"""What holds for every method whatever its equation, and the doors through which a method of one's own comes in."""

import dataclasses
import functools
import importlib.util
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_methods_oracle import STEPWISE, B, G, L, M, P, V, batch, masks_for, reads_of

from gdsd_jax.config import TrainConfig, freeze
from gdsd_jax.config.read import config_module
from gdsd_jax.denoiser import DenoiserConfig, init_base, init_lora
from gdsd_jax.diffusion import SamplerConfig
from gdsd_jax.diffusion.scoring import read_tokens
from gdsd_jax.methods import METHODS, Method, Scores, build, check, common, loss_on_views
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.telemetry.warnings import precursors

ROOT = Path(__file__).resolve().parents[2]
QUICK = {"xla_backend_optimization_level": 0}  # half the compile time
SETTINGS = {"tracerl": {"shrink": 2}, "spg": {"block_length": 2}, "stable_drl": {"block_length": 2}}
SETTINGS["gdpo"] = {"rule": "gauss-2"}
WITHIN_COMPLETION = ("diffu_grpo", "wd1", "coupled_grpo", "spg", "stable_drl", "gdpo")
EVERY = pytest.mark.parametrize("name", METHODS)


def only(*fast: str):
    """Parametrizes over all methods, of which the fast tier has those that are named."""
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=[] if name in fast else [pytest.mark.slow]) for name in METHODS]
    )


FEW = settings(max_examples=5)
SEEDS = st.integers(0, 2**16).map(np.random.default_rng)
# All that a method sees of the new, the old and the reference policy is these three tables of logits.
TABLES = SEEDS.map(lambda rng: rng.normal(size=(3, B, L, V)).astype(np.float32))
MASKS = SEEDS.map(lambda rng: rng.random((M, B, L)) < 0.5)


@functools.cache
def method_named(name: str) -> Method:
    return build(name, **SETTINGS.get(name, {}))


@functools.cache
def compiled(name: str):
    """Contributions of rows, metrics and gradient; and the largest difference that cutting into micro-batches makes."""
    method = method_named(name)

    def run(tables, rows, masked):
        views = method.views(masked, rows)

        def score(policy):
            return method.score(reads_of(method, views, policy, rows), views)

        old, ref = (score(table) for table in tables[1:])
        old, ref = None if method.old == "unused" else old, ref if method.needs_reference else None
        constants = method.constants(rows, old, ref, score(tables[0]))

        def loss(policy):
            new = score(policy)
            losses, metrics = method.objective(new, constants)
            contributions = sum(losses.values())
            return jnp.sum(contributions), (contributions, metrics, new)

        gradient, (contributions, metrics, new) = jax.grad(loss, has_aux=True)(tables[0])
        cuts = (slice(0, 2), slice(2, 5), slice(5, 6))
        pieces = [method.objective(*jax.tree.map(lambda x: x[cut], (new, constants)))[0] for cut in cuts]  # noqa: B023
        pieces = [sum(losses.values()) for losses in pieces]
        split = jnp.max(jnp.abs(jnp.concatenate(pieces) - contributions)) / (1 + jnp.max(jnp.abs(contributions)))
        return contributions, metrics, gradient, split

    return jax.jit(run, compiler_options=QUICK)


def masked_for(name: str, drawn: np.ndarray) -> jax.Array:
    """Drawn masks where a method lets masks vary; the whole completion where it does not."""
    fixed = masks_for(name)
    if name in STEPWISE:
        return jnp.asarray(fixed)
    completion = fixed[:, :, P:] if name in ("diffu_grpo", "wd1") else drawn[: len(fixed)]
    return jnp.asarray(np.concatenate([fixed[:, :, :P], completion], axis=2))


@only("gdsd", "gdsd_tlc", "spg", "tracerl", "exact_pg")
@FEW
@given(tables=TABLES, drawn=MASKS, order=st.permutations(range(G)), groups=st.permutations(range(B // G)))
def test_permuting_groups_and_their_rows_permutes_the_contributions(name, tables, drawn, order, groups):
    rows, masked = batch(), masked_for(name, drawn)
    index = np.array([g * G + i for g in groups for i in order])
    permuted = jax.tree.map(lambda x: x[index], rows)
    before = compiled(name)(tables, rows, masked)[0]
    after = compiled(name)(tables[:, index], permuted, masked[:, index])[0]
    np.testing.assert_allclose(after, before[index], rtol=2e-5, atol=1e-5)


@EVERY
@FEW
@given(tables=TABLES, drawn=MASKS, constants=st.tuples(st.integers(-3, 3), st.integers(-3, 3)))
def test_a_constant_added_to_a_groups_rewards_changes_nothing(name, tables, drawn, constants):
    rows, masked = batch(), masked_for(name, drawn)
    moved = rows.replace(rewards=rows.rewards + jnp.repeat(jnp.asarray(constants, jnp.float32), G))
    before, after = (compiled(name)(tables, x, masked) for x in (rows, moved))
    np.testing.assert_allclose(after[0], before[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(after[2], before[2], rtol=1e-4, atol=1e-4)


@EVERY
@FEW
@given(tables=TABLES, drawn=MASKS)
def test_an_unmoved_policy_has_ratio_one_and_clips_nothing(name, tables, drawn):
    metrics = compiled(name)(tables[[0, 0, 2]], batch(), masked_for(name, drawn))[1]
    if method_named(name).records:
        return  # the old policy of these is what the rollout recorded
    masked_rows = masked_for(name, drawn)[0, :, P:].any(axis=1)
    for key, value in metrics.items():
        if key in ("clipped", "log_ratio", "kl_old"):
            np.testing.assert_array_equal(value, 0.0, err_msg=key)
        elif key == "ratio":
            expected = masked_rows if name == "unigrpo" else np.ones(B)
            value = value if name not in WITHIN_COMPLETION else value.mean()
            np.testing.assert_allclose(value, expected if value.ndim else 1.0, rtol=1e-5)


@EVERY
@FEW
@given(tables=TABLES, drawn=MASKS)
def test_micro_batches_add_up_to_the_batch(name, tables, drawn):
    assert compiled(name)(tables, batch(), masked_for(name, drawn))[3] < 1e-5


@EVERY
@FEW
@given(tables=TABLES, drawn=MASKS, scale=st.sampled_from([1.0, 30.0]), whole=st.booleans())
def test_gradients_are_finite_whatever_is_masked(name, tables, drawn, scale, whole):
    drawn[:, 0], drawn[:, 1], drawn[0, 2] = whole, not whole, whole
    contributions, metrics, gradient, _ = compiled(name)(tables * scale, batch(), masked_for(name, drawn))
    assert np.all(np.isfinite(contributions)) and np.all(np.isfinite(gradient))
    assert all(np.all(np.isfinite(value)) for value in metrics.values())


@EVERY
@FEW
@given(tables=TABLES, drawn=MASKS)
def test_only_some_methods_score_the_tail_behind_the_first_eos(name, tables, drawn):
    rows, masked = batch(), masked_for(name, drawn | True)
    tail = np.asarray(rows.completion_mask) == 0
    change = np.random.default_rng(0).normal(size=tables.shape).astype(np.float32)
    changed = tables + 2.0 * change * tail[None, :, :, None]
    before, after = compiled(name)(tables, rows, masked), compiled(name)(changed, rows, masked)
    if name in WITHIN_COMPLETION:
        np.testing.assert_allclose(after[0], before[0], rtol=1e-6)
        assert not np.any(np.asarray(before[2])[tail])
    else:
        # A ratio of a score to itself is 1 whatever it is: of such a loss only the gradient tells.
        assert np.max(np.abs(after[0] - before[0])) > 0 or np.any(np.asarray(before[2])[tail])


@EVERY
@FEW
@given(tables=TABLES, drawn=MASKS, rng=SEEDS)
def test_a_constant_on_all_logits_of_a_position_changes_no_method(name, tables, drawn, rng):
    """The constants differ between policies, rows and positions; not even a difference of two policies changes."""
    masked, shift = masked_for(name, drawn), rng.uniform(-5, 5, size=(3, B, L, 1)).astype(np.float32)
    before, after = (compiled(name)(x, batch(), masked) for x in (tables, tables + shift))
    np.testing.assert_allclose(after[0], before[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(after[2], before[2], rtol=1e-3, atol=1e-4)


@given(shift=st.floats(-20, 20), top_k=st.integers(1, 6))
@FEW
def test_a_constant_on_all_logits_of_a_position_changes_no_read(shift, top_k):
    config = tiny(vocab_size=6)
    rng = np.random.default_rng(top_k)
    # A head column of ones turns the last coordinate of the hidden state into a constant on every logit.
    head = jnp.asarray(np.concatenate([rng.normal(size=(6, 7)), np.ones((6, 1))], axis=1), jnp.float32)
    hidden = jnp.asarray(rng.normal(size=(5, 8)), jnp.float32)
    reads = ("log_prob", "centred", "entropy", ("centred_top_k", top_k))
    targets = jnp.asarray(rng.integers(0, 6, 5), jnp.int32)
    read = lambda h: read_tokens(config, {"head": head}, h, targets, reads, chunk=8)  # noqa: E731
    before, after = read(hidden), read(hidden.at[:, -1].add(shift))
    for name in reads:
        np.testing.assert_allclose(after[name], before[name], atol=2e-5)


# -------------------------------------------------------------------------------------------------- through a denoiser

PADS = 3


def tiny(**sizes) -> DenoiserConfig:
    fields = {field.name: 1 for field in dataclasses.fields(DenoiserConfig) if field.default is dataclasses.MISSING}
    fields |= {"vocab_size": 12, "hidden_size": 8, "num_heads": 2, "num_kv_heads": 2, "intermediate_size": 8}
    fields |= {"family": "llada", "max_length": 64, "rope_theta": 1e4, "rms_norm_eps": 1e-5, "dtype": "float32"}
    fields |= {"qkv_bias": False, "tied_head": False, "next_token_logits": False, "remat": "none", **sizes}
    return DenoiserConfig(**fields)


@functools.cache
def denoised(name: str):
    """Loss and scores of given prompts, completions and masks, by a tiny denoiser."""
    config, rows = tiny(), batch()
    base = init_base(config, jax.random.key(0))

    def run(lora, prompts, prompt_mask, completions, masked):
        return loss_on_views(
            name,
            config,
            base,
            lora,
            prompts=prompts,
            completions=completions,
            masked=masked,
            prompt_mask=prompt_mask,
            completion_mask=rows.completion_mask,
            commit_step=rows.commit_step,
            confidence=rows.confidence,
            rollout_log_prob=rows.log_prob,
            rollout_entropy=rows.entropy,
            sampler=rows.sampler,
            rewards=rows.rewards,
            group_size=G,
            **SETTINGS.get(name, {}),
        )

    return jax.jit(run, compiler_options=QUICK)


def drawn_rows(name: str, rng: np.random.Generator) -> tuple:
    """Prompts of which some are padded, completions, and masks that leave pads clean."""
    prompts, completions = (rng.integers(3, 12, (B, n), dtype=np.int32) for n in (P, L))
    prompt_mask = np.arange(P) >= rng.integers(0, P, (B, 1))
    masked = np.array(masked_for(name, rng.random((M, B, L)) < 0.5))
    masked[:, :, :P] &= prompt_mask
    return prompts, prompt_mask, completions, masked


@only("gdsd", "spg", "tracerl")
@FEW
@given(rng=SEEDS)
def test_an_adapter_whose_second_factor_is_zero_is_no_adapter(name, rng):
    adapter = init_lora(tiny(), jax.random.key(rng.integers(2**16)), rank=2, alpha=4.0, targets=("q", "down"))
    rows = drawn_rows(name, rng)
    off, zero = denoised(name)(None, *rows), denoised(name)(adapter, *rows)
    for x, y in zip(off, zero, strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-6, atol=1e-6)


@EVERY
@FEW
@given(rng=SEEDS)
def test_more_padding_changes_nothing_whatever_it_holds(name, rng):
    prompts, prompt_mask, completions, masked = drawn_rows(name, rng)
    pads = rng.integers(0, 12, (B, PADS), dtype=np.int32)
    prompts_too = np.concatenate([pads, prompts], axis=1)
    wider = (prompts_too, np.pad(prompt_mask, [(0, 0), (PADS, 0)]), completions)
    before = denoised(name)(None, prompts, prompt_mask, completions, masked)
    after = denoised(name)(None, *wider, np.pad(masked, [(0, 0), (0, 0), (PADS, 0)]))
    for x, y in zip(before, after, strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-4)


# ----------------------------------------------------------------------------------------------------- masks and pieces


@EVERY
def test_drawn_masks_leave_the_prompt_clean_and_mask_something(name):
    rows, method = batch(), method_named(name)

    def draw(key):
        masked = method.masks(key, rows)
        return masked, method.views(masked, rows)

    masked, views = jax.jit(draw, compiler_options=QUICK)(jax.random.key(3))
    masked = np.asarray(masked)
    assert masked.dtype == bool and masked.shape[1:] == rows.tokens.shape
    assert masked[:, :, P:].any()
    assert name in ("diffu_grpo", "wd1", "spg", "stable_drl") or not masked[:, :, :P].any()
    assert len(views.sources) == len(views.weights)


def test_masks_of_the_semi_autoregressive_forward_process():
    method, block, rows = build("spg", block_length=2, prompt_mask_rate=0.0, num_t=400), 2, batch()
    draw = jax.jit(lambda key: method.masks(key, rows), compiler_options=QUICK)
    masked = np.asarray(draw(jax.random.key(0)))[:, :, P:]
    ends = np.asarray(rows.completion_mask.sum(axis=1), int)
    for i, n in enumerate(ends):
        assert masked[:, i, n:].all(), "behind the EOS everything is masked"
        first = masked[:, i].argmax(axis=1)
        assert (first < n).all(), "and something before it"
        current = first // block * block
        assert set(current) == set(range(0, n, block)), "every occupied block comes up"
        for view, start in zip(masked[:, i], current, strict=True):
            assert view[start + block :].all()


@given(values=st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=2))
def test_kl_estimators(values):
    new, ref = jnp.asarray(values, jnp.float32)
    d = new - ref
    gradients = {"k1": 1 + d, "k2": d, "k3": 1 - jnp.exp(-d)}
    for name, estimate in common.KL.items():
        np.testing.assert_allclose(jax.grad(estimate)(new, ref), gradients[name], rtol=1e-4, atol=1e-5)
        assert name == "k1" or estimate(new, ref) >= -1e-6
    np.testing.assert_allclose(common.k1(new, ref), d)


@pytest.mark.parametrize("d", [-300.0, -81.0, -79.0])
def test_k3_far_below_zero_pulls_back(d):
    """The sum `d` over a sequence reaches such values; a capped exponential would leave only the slope +1 of `d`."""
    value, slope = jax.value_and_grad(common.k3)(jnp.asarray(d), jnp.asarray(0.0))
    assert np.isfinite(value) and np.isfinite(slope)
    assert slope < -1e30
    if d < -80:
        nearer = common.k3(jnp.asarray(d + 1), jnp.asarray(0.0))
        np.testing.assert_allclose(nearer - value, slope, rtol=1e-3)


@pytest.mark.parametrize("eps", [0.0, 4e-4])
def test_a_log_clip_lets_all_of_the_gradient_through_at_its_bounds(eps):
    clip = lambda x: common.log_clip(x, eps, eps)[0]  # noqa: E731
    assert jax.grad(clip)(jnp.asarray(0.0)) == 1.0
    high = jnp.asarray(math.log1p(eps), jnp.float32)
    assert jax.grad(clip)(high) == 1.0 and jax.grad(clip)(high + 1e-3) == 0.0 == jax.grad(clip)(-high - 1e-3)


def test_a_trust_region_of_zero_still_lets_the_first_update_through():
    gradient = jax.grad(lambda x: common.ppo(x, jnp.asarray(-2.0), 0.0, 0.0)[0])(jnp.asarray(0.0))
    assert gradient == 2.0


@pytest.mark.parametrize(("advantage", "log_ratio", "expected"), [(0.0, 200.0, 0.0), (1.0, 200.0, -1.2)])
def test_the_clip_holds_ratios_that_overflow(advantage, log_ratio, expected):
    loss, _ = common.ppo(jnp.asarray(log_ratio), jnp.asarray(advantage), 0.2, 0.2)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_effective_share_of_group_weights():
    shares = common.effective_share(jnp.asarray([0.5, 0.5, 1.0, 0.0]), 2)
    np.testing.assert_allclose(shares, [1.0, 1.0, 0.5, 0.5])


# ------------------------------------------------------------------------------------------------ a method of one's own


def test_an_imported_method_runs_without_an_edit_elsewhere():
    name, rows = "example_method:HUBER", batch()
    prompts, prompt_mask, completions, _ = drawn_rows("gdsd", np.random.default_rng(0))
    loss, scores = denoised(name)(None, prompts, prompt_mask, completions, masks_for("gdsd"))
    assert scores.shape == (B, M) and np.isfinite(loss)
    # Its score takes no part in the loss before the policy moves: what remains is Huber's function of the advantages.
    advantage = np.abs(common.leave_one_out(rows.rewards, G))
    huber = np.where(advantage <= 0.1, advantage**2 / 2, 0.1 * (advantage - 0.05))
    np.testing.assert_allclose(loss, M * huber.mean(), rtol=1e-5)
    check(build(name), name="HUBER", prompt_length=P, completion_length=L, group_size=G)


def test_the_guide_shows_the_example_as_it_is():
    guide = (ROOT / "docs" / "new_method.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    assert (ROOT / "tests" / "example_method.py").read_text() in blocks


@EVERY
def test_every_method_keeps_the_contract(name):
    method = method_named(name)
    check(method, name=name, prompt_length=5, completion_length=12, group_size=2)
    if name == "gdsd_tlc":
        check(build(name, top_k=3), name=name, prompt_length=5, completion_length=12, group_size=2)


BROKEN = {
    "masks(key, batch) failed": {"masks": lambda key: None},
    "masks must return bool [M, 4, 17]": {"masks": lambda key, batch: jnp.zeros((1, 4, 12), bool)},
    "views must return a gdsd_jax.diffusion.scoring.Views": {"views": lambda masked, batch: masked},
    "score(reads, views) failed with KeyError": {"score": lambda reads, views: reads["entropy"]},
    "score must return Scores": {"score": lambda reads, views: Scores(reads["log_prob"], None)},
    "prepare must return constants": {"prepare": lambda batch, old, ref: {"A": batch.group_size * jnp.ones(())}},
    "objective must return one value per row, [4], as 'objective', it returned float32[]": {
        "objective": lambda new, constants: ({"objective": jnp.sum(new.guided)}, {})
    },
    "objective must return ({component of the loss: value}, {metric: value})": {
        "objective": lambda new, constants: (new.guided[:, 0], {})
    },
    "floating-point values as 'objective', a component of the loss, it returned int32[4]": {
        "objective": lambda new, constants: ({"objective": jnp.round(new.guided[:, 0]).astype(jnp.int32)}, {})
    },
    "a component of the loss, it returned complex64[4]": {
        "objective": lambda new, constants: ({"objective": new.guided[:, 0] * 1j}, {})
    },
    "as 'spread'": {"objective": lambda new, constants: ({"objective": new.guided[:, 0]}, {"spread": new.guided})},
    "unknown read 'logits'": {"reads": ("logits",)},
    "old is 'sometimes'": {"old": "sometimes"},
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_method_that_breaks_the_contract_is_refused_with_what_was_expected(message):
    method = method_named("gdsd")._replace(**BROKEN[message])
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        check(method, name="mine", prompt_length=5, completion_length=12, group_size=2)
    assert str(caught.value).startswith("method 'mine': ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("gdsd", {"rewards": None}, "neither advantages nor rewards"),
        ("gdsd", {"masked": np.zeros((M, B, L), bool)}, f"masked has shape ({M}, {B}, {L}): give loss_on_views [M,"),
        pytest.param("gdsd", {"masked": None}, "give loss_on_views masked", marks=pytest.mark.slow),
        ("gdsd", {"old": np.zeros(B)}, f"old has shape ({B},): give method 'gdsd' scores of shape ({B}, {M})"),
        pytest.param("gdsd", {"ref": np.zeros((M, B))}, f"ref has shape ({M}, {B})", marks=pytest.mark.slow),
        ("exact_pg", {}, "exact_pg needs the rollout's commit_step, which is absent: give loss_on_views commit_step"),
        pytest.param("egspo", {}, "egspo needs the rollout's commit_step", marks=pytest.mark.slow),
        pytest.param(
            "agrpo",
            {"commit_step": np.zeros((B, L), int), "sampler": SamplerConfig(L, L, L, "low_confidence")},
            "give loss_on_views rollout_entropy",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_a_loss_lacks_is_named(name, given, message):
    config, rows = tiny(), batch()
    base = jax.eval_shape(lambda: init_base(config, jax.random.key(0)))
    arguments = {"prompts": np.ones((B, P), int), "completions": np.ones((B, L), int), "rewards": rows.rewards}
    arguments["masked"] = masks_for("gdsd")
    with pytest.raises(UserError, match=re.escape(message)):
        jax.eval_shape(lambda base: loss_on_views(name, config, base, None, **arguments | given), base)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("gdds", {}, "unknown method 'gdds': config.method is one of gdsd, gdsd_tlc"),
        ("example_method:NOTHING", {}, "cannot be imported"),
        ("example_method:make", {}, "not a gdsd_jax.methods.Recipe"),
        ("espo", {"psi": 1.0}, "has no setting psi: it knows beta, eps_high"),
        ("spg", {"negative": "none"}, "not one of mix, eubo, elbo, zero"),
        ("dmpo", {"alpha": 0.0}, "alpha is 0.0, it must be above 0"),
        ("tracerl", {"shrink": 0}, "shrink is 0, it must be at least 1"),
        ("diffu_grpo", {"eps_low": -0.1}, "eps_low is -0.1, it must be at least 0"),
    ],
)
def test_bad_names_and_settings_say_what_is_known(name, given, message):
    with pytest.raises(UserError, match=re.escape(message)):
        build(name, **given)


def test_files_of_methods_stay_short_and_open_with_their_equation():
    files = {Path(importlib.util.find_spec(METHODS[name].make.__module__).origin) for name in METHODS}
    for file in files:
        text = file.read_text()
        assert len(text.splitlines()) <= 120, file
        assert "    loss" in text.split('"""')[1] and "arXiv" in text.split('"""')[1], file


@pytest.mark.parametrize(
    ("metrics", "named"),
    [
        ({}, []),
        ({"policy/clipped": 0.5, "reward/zero_spread": 0.9, "completion/diversity": 0.5}, []),
        ({"policy/clipped": 0.95}, ["eps_low"]),
        ({"reward/zero_spread": 1.0, "completion/diversity": 0.0}, ["config.group_size", "config.sampler.temperature"]),
    ],
)
def test_precursors_of_a_collapse_name_the_setting_to_look_at(metrics, named):
    lines = precursors(metrics).values()
    assert len(lines) == len(named) and all(name in line for name, line in zip(named, lines, strict=True))


RECIPES = sorted(path for path in (ROOT / "configs").glob("*.py") if re.match("llada|dream|baseline", path.name))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_freeze_and_build(path):
    module = config_module(path)
    for word in ("python -m gdsd_jax.train", path.name, "hardware", "published"):
        assert word in module.__doc__.lower(), word
    for run in getattr(module, "RUNS", [None]):
        config = freeze(TrainConfig, module.get_config() if run is None else module.get_config(run))
        build(config.method, **config.method_settings)


def test_tracerl_leaves_out_what_no_step_wrote():
    """`stop_at_eos` ends a rollout early and fills it up; such a token was not sampled and has no probability."""
    sampler = SamplerConfig(completion_length=L, steps=L, block_length=L, strategy="low_confidence", stop_at_eos=True)
    steps = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, L)).at[0, 2:].set(sampler.step_limit)
    method = build("tracerl", shrink=2)
    one = dataclasses.replace(batch(), commit_step=steps, sampler=sampler)
    views = method.views(method.masks(jax.random.key(0), one), one)
    assert (views.weights[0, 0, 2:] == 0).all() and (views.weights[0, 1:] > 0).all()
    np.testing.assert_allclose(jnp.sum(views.weights[0], axis=1), [1, *[-(-L // 2)] * (B - 1)], rtol=1e-6)
    # Masked as the sampler saw it, in every view.
    used = views.masked[:, 0].any(axis=1)
    assert used.sum() == 2 and views.masked[used, 0, P + 2 :].all()


@pytest.mark.parametrize("name", ["exact_pg", "just_grpo", "agrpo", "egspo"])
def test_methods_of_steps_leave_out_what_no_step_wrote(name):
    sampler = SamplerConfig(L, L, L, "low_confidence", temperature=1.0, stop_at_eos=True)
    steps = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, L)).at[0, 2:].set(sampler.step_limit)
    one = dataclasses.replace(batch(), commit_step=steps, sampler=sampler, entropy=jnp.ones((B, L)))
    method = method_named(name)
    views = method.views(method.masks(jax.random.key(0), one), one)
    # In the loss every token counts by what it reads; these count everything but the first row's last tokens alike.
    counted = jnp.sum(views.weights, axis=0) if name != "exact_pg" else jnp.sum(views.predicted(), axis=0)
    assert not counted[0, 2:].any() and counted[0, :2].any() and counted[1:].any(axis=1).all()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_kl_of_the_teacher_is_one_to_the_reference(level):
    """The KL compares log-probabilities; a constant on all logits would move centred logits apart."""
    method = build("gdsd_teacher", beta=0.1, views=1, level=level)
    assert "log_prob" in method.reads
    one = batch()
    views = method.views(method.masks(jax.random.key(0), one), one)
    shape = views.weights.shape
    reads = lambda centred, log_prob: {"centred": jnp.full(shape, centred), "log_prob": jnp.full(shape, log_prob)}  # noqa: E731
    new, ref = method.score(reads(5.0, -1.0), views), method.score(reads(0.0, -1.2), views)
    _, metrics = method.objective(new, method.prepare(one, None, ref))
    # As `gdsd` measures it, half of the squared change of the score `1/2 sum_k l_k` over the length.
    expected = 0.5 * 0.2**2 if level == "token" else 0.5 * (0.5 * L * 0.2) ** 2 / L
    np.testing.assert_allclose(metrics["kl"], expected, rtol=1e-4)
    free = build("gdsd_teacher", beta=0.0, views=1, level=level)
    _, metrics = free.objective(free.score(reads(5.0, -1.0), views), free.prepare(one, None, None))
    assert "kl" not in metrics


def test_diagnostics_of_gdsd():
    """The numbers that the authors' code logs, from their definitions."""
    method = build("gdsd", beta=0.1, views=2, eps_low=0.5, eps_high=0.5, psi=0.3)
    rng = np.random.default_rng(0)
    new, old, ref = (Scores(*[jnp.asarray(rng.normal(size=(B, 2)), jnp.float32)] * 2) for _ in range(3))
    constants = method.prepare(batch(), old, ref)
    _, metrics = method.objective(new, constants)
    d, target = np.asarray(new.guided - old.guided), 0.3 * np.asarray(constants["advantage"])
    e = np.clip(d, np.log(0.5), np.log(1.5)) / L - target[:, None]
    np.testing.assert_allclose(metrics["log_ratio"], np.abs(d).mean(1), rtol=1e-5)
    np.testing.assert_allclose(metrics["log_ratio_max"], np.abs(d).max(1), rtol=1e-5)
    np.testing.assert_allclose(metrics["target"], np.abs(target), rtol=1e-5)
    np.testing.assert_allclose(metrics["residual"], np.abs(e).mean(1), rtol=1e-5)
    np.testing.assert_allclose(metrics["pull"], np.abs(2 * e.mean(1) / L), rtol=1e-4)
    kl = 0.5 * np.asarray(new.normalised - ref.normalised) ** 2 / L
    np.testing.assert_allclose(metrics["kl"], kl.mean(1), rtol=1e-5)
    np.testing.assert_allclose(metrics["kl_max"], kl.max(1), rtol=1e-5)
    assert build("gdsd").objective is not None and METHODS["gdsd"].settings().psi == 0.04
