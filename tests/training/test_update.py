"""One inner update: accumulation in micro-batches, the old policy's two roles, full fine-tuning, the optimizer."""

import dataclasses
import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gdsd_jax.config import OptimizerConfig
from gdsd_jax.denoiser import DenoiserConfig, LoRA, init_base, init_lora
from gdsd_jax.diffusion import SamplerConfig, sample
from gdsd_jax.diffusion.scoring import Views
from gdsd_jax.methods import METHODS, Batch, build
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.sharding import MeshConfig, make_mesh
from gdsd_jax.telemetry.warnings import precursors
from gdsd_jax.train import update_metrics
from gdsd_jax.training.optimizer import make_optimizer, require_optimizer
from gdsd_jax.training.state import init_state, policy, state_shardings
from gdsd_jax.training.update import UpdateSpec, make_inner_update, signal_to_noise, summaries

CONFIG = DenoiserConfig(
    family="llada",
    vocab_size=40,
    hidden_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    intermediate_size=32,
    max_length=64,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
    qkv_bias=False,
    tied_head=False,
    next_token_logits=False,
    mask_token_id=3,
    eos_token_id=1,
    pad_token_id=0,
)
# Unoptimised machine code: the programs run a few times each, and compile in half the time.
UNOPTIMISED = {"xla_backend_optimization_level": 0}
ROWS, GROUP, PROMPT, LENGTH = 8, 4, 3, 6
RATE = 0.05


@functools.cache
def base():
    return init_base(CONFIG, jax.random.key(0))


@functools.cache
def adapter():
    """A trained-looking adapter, so that policy and reference differ."""
    lora = init_lora(CONFIG, jax.random.key(1), rank=2, alpha=4.0, targets=("v", "down"))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape, np.float32), lora)


@functools.cache
def batch(name="gdsd"):
    """Completions of random tokens; for a method of the sampler's own steps, what the policy sampled."""
    random = random_batch()
    if "step_log_prob" not in method(name).reads:
        return random
    # A step that no policy would take has a log-probability of its own size, and a gradient beyond every tolerance.
    prompts, key = random.tokens[:, :PROMPT], jax.random.key(2)
    found = sample(CONFIG, base(), adapter(), prompts, random.prompt_mask, key, random.sampler)
    return random.replace(tokens=found.tokens, commit_step=found.commit_step, confidence=found.confidence)


@functools.cache
def random_batch():
    rng = np.random.default_rng(1)
    ends = np.array([6, 4, 6, 2, 6, 6, 5, 1])
    return Batch(
        tokens=jnp.asarray(rng.integers(4, CONFIG.vocab_size, (ROWS, PROMPT + LENGTH), dtype=np.int32)),
        prompt_mask=jnp.asarray(np.arange(PROMPT) >= np.array([0, 1, 0, 2, 0, 0, 1, 0])[:, None]),
        completion_mask=jnp.asarray((np.arange(LENGTH) < ends[:, None]).astype(np.float32)),
        rewards=jnp.asarray(rng.random(ROWS, np.float32)),
        commit_step=jnp.asarray(np.argsort(rng.random((ROWS, LENGTH))).astype(np.int32)),
        confidence=jnp.asarray(rng.random((ROWS, LENGTH), np.float32)),
        log_prob=jnp.asarray(-rng.random((ROWS, LENGTH), np.float32)),
        entropy=jnp.asarray(rng.random((ROWS, LENGTH), np.float32)),
        sampler=SamplerConfig(LENGTH, LENGTH, LENGTH, "low_confidence", temperature=1.0),
        eos_token_id=CONFIG.eos_token_id,
        group_size=GROUP,
    )


@functools.cache
def method(name, beta=0.1):
    """The method with a reference, and with clips that act on some rows but not on all."""
    known = {field.name for field in dataclasses.fields(METHODS[name].settings)}
    chosen = {"beta": beta, "eps_low": 0.02, "eps_high": 0.02, "views": 2, "psi": 1.0}
    return build(name, **{key: value for key, value in chosen.items() if key in known})


@functools.cache
def inner_update(name, microbatch_rows, by_component=False, beta=0.1):
    """Compiles an update by gradient descent, whose step shows the gradient as it is, unlike Adam's."""
    schedule = optax.constant_schedule(RATE)
    update = make_inner_update(
        UpdateSpec(CONFIG, method(name, beta), optax.sgd(schedule), schedule, microbatch_rows, vocab_chunk=16)
    )

    @functools.cache
    def compiled(has_old, lora):
        params = fresh(adapter() if lora else base())
        old = adapter() if has_old else None
        return update.lower(params, base(), old, batch(name), by_component).compile(UNOPTIMISED)

    def run(state, base, old, batch):
        return compiled(old is not None, isinstance(state.params, LoRA))(state, base, old, batch)

    return run


def fresh(params):
    """Makes a state that an update may donate."""
    return init_state(jax.tree.map(jnp.copy, params), optax.sgd(optax.constant_schedule(RATE)), 7)


@functools.cache
def updated(name, microbatch_rows, old, **settings):
    """Result of one update from `adapter()`, with no old policy ("none"), itself ("same") or another ("moved")."""
    old_params = {"none": None, "same": adapter(), "moved": jax.tree.map(lambda x: 0.7 * x, adapter())}[old]
    update = inner_update(name, microbatch_rows, **settings)
    state, metrics = update(fresh(adapter()), base(), old_params, batch(name))
    return jax.device_get((state.params, metrics, state.updates, state.iteration))


def close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def check_split(name, microbatch_rows):
    params, metrics, *_ = updated(name, ROWS, "moved")
    split_params, split_metrics, updates, iteration = updated(name, microbatch_rows, "moved")
    assert (updates, iteration) == (1, 0)
    # Micro-batches of less than a group are not independent of each other.
    assert set(split_metrics) == set(metrics) | ({"grad/signal_to_noise"} if microbatch_rows % GROUP == 0 else set())
    assert np.isfinite(split_metrics.get("grad/signal_to_noise", 0.0))
    close({key: split_metrics[key] for key in metrics}, metrics, rtol=1e-5, atol=1e-6)
    close(split_params, params, rtol=0, atol=1e-6)
    moved = max(np.abs(x - y).max() for x, y in zip(*map(jax.tree.leaves, (params, adapter())), strict=True))
    assert moved > 1e-5


def check_first_update(name):
    """Right after a rollout the old policy is the new one: an update without old scores gives the same result."""
    params, metrics, *_ = updated(name, 2, "none")
    scored_params, scored_metrics, *_ = updated(name, 2, "same")
    if method(name).old == "ratio" and "policy/log_ratio" in metrics:
        np.testing.assert_allclose(metrics["policy/log_ratio"], 0, atol=1e-7)
    close(metrics, scored_metrics, rtol=1e-4, atol=1e-5)
    close(params, scored_params, rtol=0, atol=1e-6)


def check_later_update(name):
    """A policy that has moved is compared with the one that rolled out, not with itself."""
    _, metrics, *_ = updated(name, 2, "moved")
    _, still, *_ = updated(name, 2, "none")
    assert abs(metrics["loss"] - still["loss"]) > 1e-4 * abs(still["loss"])


def check_components(name, kl):
    """Each norm is that of the accumulated component: of the gradient without a KL, and of what the KL adds to it."""
    params, metrics, *_ = updated(name, 2, "moved", by_component=True)
    without, without_metrics, *_ = updated(name, 2, "moved", beta=0.0)
    whole, plain, *_ = updated(name, 2, "moved")
    close(params, whole, rtol=0, atol=1e-7)
    assert set(metrics) == set(plain) | {"grad/objective", f"grad/{kl}"}
    close({key: metrics[key] for key in plain}, plain, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["grad/objective"], without_metrics["grad/norm"], rtol=1e-5)
    # The difference of two rounded parameters: the loosest of these comparisons.
    added = jax.tree.map(lambda x, y: (x - y) / RATE, without, params)
    np.testing.assert_allclose(metrics[f"grad/{kl}"], optax.tree.norm(added), rtol=1e-2)
    assert metrics[f"grad/{kl}"] > 1e-4


@pytest.mark.parametrize("microbatch_rows", [pytest.param(4, marks=pytest.mark.slow), 2])
def test_micro_batches_change_nothing(microbatch_rows):
    check_split("gdsd", microbatch_rows)


def test_old_policy_of_the_first_and_of_later_updates():
    check_first_update("gdsd")
    check_later_update("gdsd")


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method(name):
    check_split(name, 2)
    check_first_update(name)
    if method(name).old != "unused":
        check_later_update(name)


@pytest.mark.slow
def test_gradient_norm_of_each_component():
    check_components("gdsd", "kl")


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_gradient_norms_of_every_method(name):
    _, metrics, *_ = updated(name, 2, "moved", by_component=True)
    # A component beside the objective: the method's KL.
    other = [key for key in metrics if key in ("grad/kl", "grad/kl_old")]
    if other:
        check_components(name, other[0].removeprefix("grad/"))
    else:
        np.testing.assert_allclose(metrics["grad/objective"], metrics["grad/norm"], rtol=1e-6)


def test_metrics_of_an_update():
    _, metrics, *_ = updated("gdsd", 2, "moved")
    assert {"loss", "lr", "grad/norm", "policy/entropy", "policy/kl", "policy/clipped"} <= set(metrics)
    assert all(np.shape(value) == () and np.isfinite(value) for value in metrics.values())
    np.testing.assert_allclose(metrics["lr"], RATE)
    assert 0 < metrics["policy/clipped"] < 1
    assert 0 < metrics["policy/entropy"] < np.log(CONFIG.vocab_size)


@pytest.mark.slow
def test_a_policy_that_has_not_moved_is_not_clipped_by_its_dropout():
    """Old and new policy have the same dropout masks, so that their ratio is 1; the reference has no dropout."""
    lora, schedule = adapter().replace(dropout=0.5), optax.constant_schedule(RATE)
    spec = UpdateSpec(CONFIG, method("gdsd"), optax.sgd(schedule), schedule, microbatch_rows=4, vocab_chunk=16)
    update = make_inner_update(spec)
    _, metrics = update(fresh(lora), base(), lora, batch())
    assert metrics["policy/log_ratio_max"] == 0 and metrics["policy/clipped"] == 0
    _, still = inner_update("gdsd", 4)(fresh(adapter()), base(), adapter(), batch())
    assert abs(metrics["policy/kl"] - still["policy/kl"]) > 1e-3 * still["policy/kl"]


def test_entropy_is_that_of_masked_tokens():
    """UniGRPO masks a part of the completion; the tokens that its view shows are not predicted."""
    masked = jnp.zeros((2, 3, 5), bool).at[0, :, 2].set(True).at[1, 0, 4].set(True)
    views = Views(masked, jnp.ones((1, 3, 4)), ((0, 1),))
    np.testing.assert_array_equal(views.predicted()[0], [[0, 1, 0, 1], [0, 1, 0, 0], [0, 1, 0, 0]])
    rows = {"entropy_total": jnp.array([[6.0], [2.0]]), "hidden_total": jnp.array([[3.0], [1.0]])}
    found = summaries(rows | {"kl": jnp.array([[1.0], [3.0]]), "kl_max": jnp.array([[1.0], [3.0]])})
    assert found == {"entropy": 2.0, "kl": 2.0, "kl_max": 3.0}


def test_metrics_of_inner_updates():
    """The first update clips nothing and does not count: if the other seven clip all, the share is 1, not 7/8."""
    reports = [{"policy/clipped": 0.0, "loss": 1.0, "policy/kl_max": 0.0}]
    reports += [{"policy/clipped": 1.0, "loss": 2.0, "policy/kl_max": 0.1 * n} for n in range(7)]
    found = update_metrics(reports)
    assert found["policy/clipped"] == 1.0 and found["loss"] == 1.875 and found["policy/kl_max"] == pytest.approx(0.6)
    assert {name for name in found if name.startswith("clipped/")} == {f"clipped/update_{n}" for n in range(2, 9)}
    assert "clipped" in precursors(found)
    one_late = update_metrics(reports[:1] * 7 + reports[-1:])
    assert one_late["policy/clipped"] == pytest.approx(1 / 7) and "clipped" in precursors(one_late)
    assert not precursors(update_metrics(reports[:1]))


def test_two_updates_of_one_rollout_draw_other_masks_and_leave_the_first_state_donated():
    update = inner_update("gdsd", 2)
    state = fresh(adapter())
    donated = state.params.weights["layers"]["v"]["a"]
    state, first = update(state, base(), adapter(), batch())
    assert donated.is_deleted()
    state, second = update(state.replace(params=jax.tree.map(jnp.copy, adapter())), base(), adapter(), batch())
    assert int(state.updates) == 2
    assert float(first["policy/kl"]) != float(second["policy/kl"])


@pytest.mark.slow
def test_full_fine_tuning():
    """Without an adapter the base itself is the policy; the frozen one stays the reference."""
    params = jax.tree.map(lambda x: x * 1.01, base())
    assert policy(base(), params) == (params, None)
    assert policy(base(), adapter()) == (base(), adapter())
    state, metrics = inner_update("gdsd", ROWS)(fresh(params), base(), None, batch())
    assert float(metrics["policy/kl"]) > 0
    for path, value in jax.tree.leaves_with_path(jax.tree.map(lambda x, y: jnp.abs(x - y).max(), state.params, params)):
        assert 0 < float(value) < 1, path


def test_trained_parameters_are_float32():
    state = init_state({"w": jnp.ones(3, jnp.bfloat16)}, optax.adam(1e-3), 0)
    assert state.params["w"].dtype == jnp.float32


# ------------------------------------------------------------------------------------------------------------ optimizer


def test_signal_to_noise():
    pieces = np.random.default_rng(0).standard_normal((5, 30)) + 0.5
    mean, n = pieces.mean(axis=0), len(pieces)
    variance_of_mean = pieces.var(axis=0, ddof=1).sum() / n
    got = signal_to_noise(jnp.linalg.norm(pieces.sum(axis=0)), jnp.sum(pieces**2), n)
    np.testing.assert_allclose(got, (mean @ mean) / variance_of_mean - 1, rtol=1e-5)
    assert signal_to_noise(jnp.float32(4.0), jnp.float32(8.0), 2) > 1e30  # two equal pieces of norm 2
    assert signal_to_noise(jnp.float32(0.0), jnp.float32(0.0), 2) == 0


def test_signal_to_noise_of_noise_is_zero_on_average():
    pieces = np.random.default_rng(0).standard_normal((400, 4, 30))
    found = [signal_to_noise(jnp.linalg.norm(p.sum(axis=0)), jnp.sum(p**2), 4) for p in jnp.asarray(pieces)]
    assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(len(found)) and np.min(found) < -0.1


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, *(0.5 + 0.5 * np.cos(np.pi * np.arange(5) / 4))]),
    ],
)
def test_schedule(schedule, expected):
    _, rate = make_optimizer(OptimizerConfig(learning_rate=2e-3, warmup_updates=4, schedule=schedule), 8)
    np.testing.assert_allclose([rate(i) for i in range(9)], 2e-3 * np.array(expected), atol=1e-9)


@pytest.mark.parametrize("warmup", [0, 1])
def test_schedule_without_warm_up_starts_at_the_full_rate(warmup):
    _, rate = make_optimizer(OptimizerConfig(learning_rate=1.0, warmup_updates=warmup, schedule="linear"), 10 + warmup)
    np.testing.assert_allclose([rate(0), rate(warmup), rate(5 + warmup)], [1.0, 1.0, 0.5], atol=1e-6)


OTHERS = {"optax:lion": {"b1": 0.9}, "optax.contrib:muon": {}, "optax:adafactor": {}}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "optax:lion" else [pytest.mark.slow]) for name in OTHERS]
)
def test_any_optimizer_of_optax(name):
    """Lion and Muon move a tree of every kind of parameter, and the state finds its place on a mesh."""
    config = OptimizerConfig(learning_rate=0.1, warmup_updates=0, name=name, settings=OTHERS[name])
    optimizer, _ = make_optimizer(config, 10)
    model = dataclasses.replace(CONFIG, qkv_bias=True)
    shapes = jax.eval_shape(lambda: init_state(init_base(model, jax.random.key(0)), optimizer, 0))
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        places = state_shardings(model, optimizer, shapes)
    assert jax.tree.structure(places) == jax.tree.structure(shapes)
    lora = adapter()
    changes, _ = optimizer.update(lora, optimizer.init(lora), lora)
    assert all(0 < np.abs(change).max() < 10 for change in jax.tree.leaves(changes))


@pytest.mark.parametrize(
    ("path", "shape", "fan_in", "fan_out"),
    [
        (("up", "weight"), (2, 16, 4), 4, 16),
        (("down", "weight"), (2, 4, 16), 16, 4),
        (("up", "a"), (2, 16, 4), 16, 4),
        (("up", "b"), (2, 4, 16), 4, 16),
    ],
)
def test_muon_scales_a_step_by_inputs_and_outputs(path, shape, fan_in, fan_out):
    """The singular values of a step are `max(1, out / in)^0.5`, whichever axis has the inputs."""
    optimizer, _ = make_optimizer(OptimizerConfig(learning_rate=1.0, warmup_updates=0, name="optax.contrib:muon"), 10)
    g = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    tree = lambda x: {"layers": {path[0]: {path[1]: x}}}  # noqa: E731
    changes, _ = optimizer.update(tree(g), optimizer.init(tree(g)), tree(0 * g))
    sizes = np.linalg.svd(np.asarray(changes["layers"][path[0]][path[1]]), compute_uv=False)
    np.testing.assert_allclose(sizes, max(1, fan_out / fan_in) ** 0.5, rtol=0.35)


def test_muon_takes_each_layer_as_a_matrix():
    optimizer, _ = make_optimizer(OptimizerConfig(learning_rate=1.0, warmup_updates=0, name="optax.contrib:muon"), 10)
    g = np.random.default_rng(0).standard_normal((2, 6, 6)).astype(np.float32)
    tree = lambda x: {"layers": {"q": {"weight": jnp.asarray(x)}}}  # noqa: E731
    changes, _ = optimizer.update(tree(g), optimizer.init(tree(g)), tree(0 * g))
    for change, gradient in zip(changes["layers"]["q"]["weight"], g, strict=True):
        left, _, right = np.linalg.svd(gradient)
        # An orthogonal matrix, up to what five Newton-Schulz steps leave.
        cosine = -np.sum(change * (left @ right)) / np.linalg.norm(change) / np.sqrt(6)
        assert cosine > 0.95


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [("optax:none_such", {}, "config.optimizer.name"), ("adamw", {}, "package.module:NAME"),
     ("optax:lion", {"b3": 1}, "config.optimizer.settings do not fit 'optax:lion'"),
     ("optax:lion", {"b1": "0.9"}, "config.optimizer.settings do not fit 'optax:lion'"),
     ("optax:adamw", {"b1": 1.0}, "config.optimizer.settings .* parameters become infinite or NaN")],
)  # fmt: skip
def test_an_optimizer_that_is_none(name, settings, message):
    with pytest.raises(UserError, match=message):
        require_optimizer(OptimizerConfig(name=name, settings=settings))


def test_weight_decay_spares_norms_and_biases():
    """With no gradient at all only the decay moves a parameter."""
    model = dataclasses.replace(CONFIG, qkv_bias=True)
    params = jax.tree.map(lambda x: jnp.ones(x.shape), jax.eval_shape(lambda: init_base(model, jax.random.key(0))))
    optimizer, _ = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.5, warmup_updates=0), 10)
    changes, _ = optimizer.update(optax.tree.zeros_like(params), optimizer.init(params), params)
    moved = {
        "/".join(str(key.key) for key in path): float(np.abs(x).max()) for path, x in jax.tree.leaves_with_path(changes)
    }
    still = {name for name, change in moved.items() if change == 0}
    assert still == {name for name in moved if name.endswith(("norm", "bias"))}
    assert {"embedding", "head", "layers/q/weight"} <= set(moved) - still and {"final_norm", "layers/q/bias"} <= still


def test_unknown_schedule():
    with pytest.raises(UserError, match="'step' is not one of constant, linear, cosine"):
        make_optimizer(OptimizerConfig(schedule="step"), 10)


@pytest.mark.parametrize(("scale", "clipped"), [(10.0, 1.0), pytest.param(0.1, 0.1, marks=pytest.mark.slow)])
def test_clipping_and_decay(scale, clipped):
    config = OptimizerConfig(learning_rate=0.1, clip_norm=1.0, weight_decay=0.5, b1=0.9, warmup_updates=0)
    optimizer, _ = make_optimizer(config, 10)
    params = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    gradient = {"a": jnp.array([0.6 * scale]), "b": jnp.array([0.8 * scale])}
    changes, state = optimizer.update(gradient, optimizer.init(params), params)
    (adam,) = [s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")]
    np.testing.assert_allclose(optax.tree.norm(adam.mu), 0.1 * clipped, rtol=1e-6)
    # Adam's first step has size 1 per entry; the decay is decoupled from it.
    np.testing.assert_allclose([changes["a"][0], changes["b"][0]], [-0.1 * (1 + 1.5), -0.1 * (1 + 2.0)], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("trained", [adapter, base])
def test_an_update_in_bfloat16_points_where_that_in_float32_does(trained):
    """Also on a CPU, whose compiler lacks some products of bfloat16 with a float32 result."""

    def change(dtype):
        config, schedule = dataclasses.replace(CONFIG, dtype=dtype, remat="full"), optax.constant_schedule(RATE)
        spec = UpdateSpec(config, method("gdsd"), optax.sgd(schedule), schedule, microbatch_rows=4, vocab_chunk=16)
        state, _ = make_inner_update(spec)(fresh(trained()), base(), None, batch())
        return jax.tree.map(jnp.subtract, state.params, trained())

    exact, rough = (jax.flatten_util.ravel_pytree(change(dtype))[0] for dtype in ("float32", "bfloat16"))
    assert jnp.vdot(exact, rough) > 0.98 * jnp.linalg.norm(exact) * jnp.linalg.norm(rough)
