"""The denoiser against recorded PyTorch logits, and what must hold of any denoiser: pads, adapters, numerics, names.

Recorded logits agree within 1e-4, hidden states within 1e-5 of their size.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import optimised

from gdsd_jax import hub
from gdsd_jax.denoiser import (
    TARGETS,
    DenoiserConfig,
    denoise,
    hidden_states,
    hidden_states_at,
    init_base,
    init_lora,
    logical_axes,
    logits_from_hidden,
    model,
    ops,
    pick,
)
from gdsd_jax.denoiser.forward import real_tokens, run
from gdsd_jax.denoiser.prepared import repeated, unstacked
from gdsd_jax.denoiser.quantise import quantised
from gdsd_jax.families import read_config
from gdsd_jax.runtime.errors import UserError

CONFIG = DenoiserConfig(
    family="dream",
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=48,
    max_length=64,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
    qkv_bias=True,
    tied_head=False,
    next_token_logits=True,
    mask_token_id=3,
    eos_token_id=1,
    pad_token_id=0,
)
CHECKPOINTS = ("llada_tiny", "llada_tiny_gqa", "llada_tiny_sharded", "dream_tiny", "dream_tiny_sharded")
compiled = jax.jit(denoise, static_argnums=0)


@functools.cache
def checkpoint(directory):
    return hub.load_checkpoint(directory)


def recorded(golden, name, file):
    """Arrays of a checkpoint's file; a sharded twin takes what it lacks from the whole."""
    directory = golden / name
    if not (directory / file).exists():
        directory = golden / name.removesuffix("_sharded")
    return dict(np.load(directory / file))


def shifted(raw):
    return np.concatenate([raw[:, :1], raw[:, :-1]], axis=1)


# ----------------------------------------------------------------------------------------------------- recorded numbers


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_without_padding(golden, name):
    config, base = checkpoint(golden / name)
    expected = recorded(golden, name, "logits_nopad.npz")["logits"]
    logits = compiled(config, base, None, recorded(golden, name, "inputs_nopad.npz")["input_ids"])
    expected = shifted(expected) if config.next_token_logits else expected
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


def test_recorded_shift_is_ours(golden):
    arrays = recorded(golden, "dream_tiny", "logits_nopad.npz")
    np.testing.assert_array_equal(shifted(arrays["logits"]), arrays["logits_shifted"])


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("llada_tiny", "logits_with_attention_mask"),
        ("llada_tiny_gqa", "logits_with_attention_mask"),
        ("dream_tiny", "logits_sampler_convention"),
    ],
)
def test_logits_with_left_padding(golden, name, key):
    config, base = checkpoint(golden / name)
    inputs = recorded(golden, name, "inputs_leftpad.npz")
    real = inputs["attention_mask"].astype(bool)
    logits = np.asarray(compiled(config, base, None, inputs["input_ids"], prompt_mask=real))
    expected = recorded(golden, name, "logits_leftpad.npz")[key]
    if config.next_token_logits:
        # A shifted row reads its left neighbour: the first real token of a padded row reads a pad, and nobody reads it.
        expected = shifted(expected)
        real = real & np.concatenate([real[:, :1], real[:, :-1]], axis=1)
    np.testing.assert_allclose(logits[real], expected[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llada_tiny", "llada_tiny_gqa", "dream_tiny"])
def test_final_hidden_states(golden, name):
    config, base = checkpoint(golden / name)
    tokens = recorded(golden, name, "inputs_nopad.npz")["input_ids"][:1]
    expected = recorded(golden, name, "hidden_nopad_row0.npz")["final_norm"]
    hidden = jax.jit(hidden_states, static_argnums=0)(config, base, None, tokens)
    expected = shifted(expected) if config.next_token_logits else expected
    np.testing.assert_allclose(hidden, expected, atol=2e-5, rtol=0)


def test_hidden_states_after_each_block(golden):
    """A denoiser cut after block i gives the final norm of the recorded residual stream after block i."""
    config, base = checkpoint(golden / "llada_tiny")
    tokens = recorded(golden, "llada_tiny", "inputs_nopad.npz")["input_ids"][:1]
    stream = recorded(golden, "llada_tiny", "hidden_nopad_row0.npz")
    np.testing.assert_array_equal(base["embedding"][tokens], stream["embed"])
    for block in range(config.num_layers):
        cut = dataclasses.replace(config, num_layers=block + 1)
        layers = jax.tree.map(lambda x, n=block + 1: x[:n], base["layers"])
        hidden = jax.jit(hidden_states, static_argnums=0)(cut, base | {"layers": layers}, None, tokens)
        expected = ops.rms_norm(jnp.asarray(stream[f"block{block}_out"]), base["final_norm"], config.rms_norm_eps)
        np.testing.assert_allclose(hidden, expected, atol=2e-5, rtol=0)


# -------------------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("name", ["llada_tiny", "dream_tiny"])
def test_padding_and_its_content_change_nothing(golden, name):
    config, base = checkpoint(golden / name)
    tokens = recorded(golden, name, "inputs_nopad.npz")["input_ids"]
    bare = np.asarray(compiled(config, base, None, tokens))
    rng = np.random.default_rng(0)
    for pads in (np.full((len(tokens), 8), config.pad_token_id), rng.integers(0, config.vocab_size, (len(tokens), 8))):
        padded = np.concatenate([pads, tokens], axis=1).astype(np.int32)
        mask = np.broadcast_to(np.arange(padded.shape[1]) >= 8, padded.shape)
        logits = np.asarray(compiled(config, base, None, padded, prompt_mask=mask))[:, 8:]
        # Position 0 of a shifted denoiser has no left neighbour: it keeps its own logits, or reads a pad's.
        first = 1 if config.next_token_logits else 0
        np.testing.assert_allclose(logits[:, first:], bare[:, first:], atol=2e-5, rtol=0)


def test_prompt_mask_may_stop_at_the_prompt():
    mask = jnp.array([[False, True], [True, True]])
    np.testing.assert_array_equal(real_tokens(mask, 2, 4), [[False, True, True, True], [True] * 4])
    assert real_tokens(None, 2, 4) is None
    with pytest.raises(UserError, match="longer than the 1 tokens"):
        real_tokens(mask, 2, 1)


# ------------------------------------------------------------------------------------------------------------- adapters


def noise(seed, tree):
    """The tree with normal noise added; drawn on the host, which compiles nothing."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(x + 0.1 * rng.standard_normal(x.shape, np.float32)), tree)


@pytest.fixture(scope="module")
def small():
    """A random base, tokens, and an adapter, fresh and trained, on every matrix."""
    shapes = jax.eval_shape(lambda: init_base(CONFIG, jax.random.key(0)))
    base = noise(0, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes))
    base["embedding"], base["head"] = 10 * base["embedding"], 10 * base["head"]
    base["final_norm"] = 1 + base["final_norm"]
    for name in ("attn_norm", "mlp_norm"):
        base["layers"][name] = 1 + base["layers"][name]
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 10), dtype=np.int32)
    fresh = init_lora(CONFIG, jax.random.key(2), rank=3, alpha=6.0, targets=TARGETS)
    return base, tokens, fresh, noise(1, fresh)


@pytest.fixture(scope="module")
def dropping():
    """An adapter with dropout, fresh and trained; on two matrices alone, as random bits take long to compile."""
    fresh = init_lora(CONFIG, jax.random.key(2), rank=3, alpha=6.0, targets=("v", "down"), dropout=0.5)
    return fresh, noise(1, fresh)


def test_fresh_adapter_changes_nothing(small):
    base, tokens, fresh, _ = small
    off = compiled(CONFIG, base, None, tokens)
    np.testing.assert_allclose(compiled(CONFIG, base, fresh, tokens), off, atol=1e-5)
    assert all(not np.any(pair["b"]) for pair in fresh.weights["layers"].values())


def test_adapter_equals_merged_matrix(small):
    base, tokens, _, lora = small
    scale = lora.alpha / lora.rank
    layers = dict(base["layers"])
    for name, pair in lora.weights["layers"].items():
        product = np.einsum("nir,nro->noi", *(np.asarray(pair[x], np.float64) for x in "ab"))
        layers[name] = layers[name] | {"weight": (layers[name]["weight"] + scale * product).astype(np.float32)}
    adapted = compiled(CONFIG, base, lora, tokens)
    merged = compiled(CONFIG, base | {"layers": layers}, None, tokens)
    np.testing.assert_allclose(adapted, merged, atol=2e-5)
    assert np.abs(adapted - compiled(CONFIG, base, None, tokens)).max() > 0.1


def test_dropout_acts_with_a_key_alone(small, dropping):
    base, tokens, *_ = small
    fresh, lora = dropping
    quiet = compiled(CONFIG, base, lora, tokens)
    np.testing.assert_array_equal(quiet, compiled(CONFIG, base, lora.replace(dropout=0.0), tokens))
    one = compiled(CONFIG, base, lora, tokens, dropout_key=jax.random.key(0))
    again = compiled(CONFIG, base, lora, tokens, dropout_key=jax.random.key(0))
    other = compiled(CONFIG, base, lora, tokens, dropout_key=jax.random.key(1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - quiet).max() > 1e-2
    assert np.abs(one - other).max() > 1e-2
    # Only the adapter's branch is dropped, never the base's.
    untouched = compiled(CONFIG, base, fresh, tokens, dropout_key=jax.random.key(0))
    np.testing.assert_allclose(untouched, compiled(CONFIG, base, None, tokens), atol=1e-5)


def test_adapter_on_some_targets(dropping):
    shapes = {name: (pair["a"].shape, pair["b"].shape) for name, pair in dropping[0].weights["layers"].items()}
    assert shapes == {"v": ((2, 32, 3), (2, 3, 16)), "down": ((2, 48, 3), (2, 3, 32))}
    for name, fan_in in (("v", 32), ("down", 48)):
        a = np.asarray(dropping[0].weights["layers"][name]["a"])
        assert np.abs(a).max() <= fan_in**-0.5 < 1.3 * np.abs(a).max()


# ------------------------------------------------------------------------------------------------------------- numerics


def test_bfloat16_is_close_to_float32(small):
    base, tokens, _, lora = small
    half = dataclasses.replace(CONFIG, dtype="bfloat16")
    exact = np.asarray(compiled(CONFIG, base, lora, tokens))
    rough = compiled(half, base, lora, tokens)
    assert rough.dtype == jnp.float32
    assert jax.eval_shape(lambda: hidden_states(half, base, lora, jnp.asarray(tokens))).dtype == jnp.bfloat16
    error = np.abs(rough - exact)
    assert 0 < np.sqrt(np.mean(error**2)) < 0.02 * exact.std()
    assert error.max() < 0.1 * exact.std()


# Unoptimised machine code: these programs run once, and compile in half the time.
@functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def logits_and_gradient(config, base, lora, tokens, key):
    def loss(base, lora):
        logits = denoise(config, base, lora, tokens, dropout_key=key)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 5]), logits

    (_, logits), gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(base, lora)
    return logits, gradient


@pytest.mark.slow
@pytest.mark.parametrize("unroll", [1, CONFIG.num_layers], ids=["scanned", "unrolled"])
def test_remat_changes_nothing(small, dropping, unroll):
    """With dropout on: what is recomputed in the backward pass must drop the same entries."""
    base, tokens, *_ = small
    lora, plain = dropping[1], dataclasses.replace(CONFIG, layer_unroll=unroll)
    logits, gradient = logits_and_gradient(plain, base, lora, tokens, jax.random.key(5))
    assert all(np.any(x) for x in jax.tree.leaves(gradient))
    for remat in ("full", "dots"):
        config = dataclasses.replace(plain, remat=remat)
        other_logits, other = logits_and_gradient(config, base, lora, tokens, jax.random.key(5))
        np.testing.assert_allclose(other_logits, logits, atol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), other, gradient)


@pytest.mark.parametrize("weights", ["stored", "int8"])
def test_parameters_that_are_prepared_twice_stay_as_the_caller_had_them(small, weights):
    """Preparing changes neither the caller's parameters nor what the denoiser computes, once or twice."""
    base, tokens, _, lora = small
    base = quantised(base) if weights == "int8" else base
    config = dataclasses.replace(CONFIG, layer_unroll=CONFIG.num_layers, weights=weights)
    apart, _ = unstacked(config, base, lora)
    names = set(apart)
    once = repeated(config, apart, lora, tokens=10**6)
    assert "first_projections" in once[0] and set(apart) == names
    expected = compiled(config, base, lora, tokens)
    for prepared in (once, repeated(config, *once, tokens=10**6)):
        np.testing.assert_allclose(compiled(config, *prepared, tokens), expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("shifted", "remat"), [(False, "none"), (True, "full")])
def test_unrolled_layers_compute_what_is_read_as_the_scan_does(small, shifted, remat):
    """A slice, the same places in every row, each row's own: the last layer runs for these alone; and gradients."""
    base, tokens, _, lora = small
    tokens, rows = jnp.asarray(tokens), tokens.shape[0]
    places = (slice(0, 3), slice(2, 5), jnp.array([4, 0, 1]), jnp.arange(2 * rows).reshape(rows, 2) % 5)
    assert CONFIG.num_layers > 1
    found = []
    for unroll in (1, CONFIG.num_layers):
        config = dataclasses.replace(CONFIG, layer_unroll=unroll, remat=remat, next_token_logits=shifted)

        def read(parameters, config=config):
            states = hidden_states_at(config, *parameters, tokens)
            read_there = [states(at) for at in places]
            whole = pick(hidden_states(config, *parameters, tokens), places[-1])
            return sum(jnp.sum(jnp.sin(x)) for x in read_there), (read_there, whole)

        with optimised(False):
            found.append(jax.jit(jax.value_and_grad(read, has_aux=True))((base, lora)))
    (_, (states, whole)), _ = found[-1]
    np.testing.assert_allclose(states[-1], whole, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *found)


@pytest.mark.slow
def test_unrolled_layers_read_positions_under_tables_of_each_row(small):
    """Rows that forget pads which they wrote have positions of their own; what is read of them is what a scan gives."""
    base, tokens, _, _ = small
    tables = ops.rope_tables(jnp.arange(10), CONFIG.head_dim, CONFIG.rope_theta)
    tables = jax.tree.map(lambda table: jnp.stack([table, table[::-1]]), tables)
    found = []
    for unroll in (1, CONFIG.num_layers):
        config = dataclasses.replace(CONFIG, layer_unroll=unroll)
        last = run(config, base, None, jnp.asarray(tokens), model.Context(None, tables))
        found.append([last(at)[0] for at in (slice(2, 4), jnp.array([4, 0, 1]), jnp.array([[2, 3], [9, 0]]))])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *found)


def test_low_rank_product_has_the_gradient_of_the_plain_one():
    draws = np.random.default_rng(0)
    x, a, b, g = (jnp.asarray(draws.standard_normal(s), jnp.float32) for s in ((2, 5, 6), (6, 3), (3, 4), (2, 5, 4)))
    highest = jax.lax.Precision.HIGHEST
    plain, pull_back = jax.vjp(lambda x, a, b: jnp.dot(jnp.dot(x, a, precision=highest), b, precision=highest), x, a, b)
    ours, our_pull_back = jax.vjp(lambda x, a, b: ops.low_rank(x, a, b, highest), x, a, b)
    np.testing.assert_allclose(ours, plain, rtol=1e-6)
    for one, other in zip(our_pull_back(g), pull_back(g), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["q", "gate"])
def test_bfloat16_keeps_a_change_far_below_its_rounding(name):
    """Rounded apart, a change below half a unit in the last place of the base's product is lost in every entry."""
    config = dataclasses.replace(CONFIG, hidden_size=128)
    base = {
        "weight": jax.random.normal(jax.random.key(0), model.target_shapes(config)[name][::-1]).astype(jnp.bfloat16)
    }
    base |= {"bias": jnp.ones(base["weight"].shape[0])} if name == "q" else {}
    x = jax.random.normal(jax.random.key(1), (8192, 128)).astype(jnp.bfloat16)
    lora = init_lora(config, jax.random.key(2), rank=8, alpha=16.0, targets=(name,))
    moved = {"a": lora.weights["layers"][name]["a"][0]}
    moved["b"] = 1e-4 * jax.random.normal(jax.random.key(3), (8, base["weight"].shape[0]))

    def change(dtype):
        linear = model.linear_of(dataclasses.replace(config, dtype=dtype), name, lora.replace(weights=None))
        product = lambda b: linear.apply({"params": base, "lora": moved | {"b": b}}, x.astype(dtype), False)  # noqa: E731
        return np.asarray(product(moved["b"]), np.float64) - np.asarray(product(0 * moved["b"]), np.float64)

    seen, true = change("bfloat16").ravel(), change("float32").ravel()
    # Half a unit in the last place of a number of the product's size, 11, is 0.03.
    assert np.abs(true).max() < 0.01
    np.testing.assert_allclose(seen @ true / (true @ true), 1, atol=0.1)


def test_product_with_addends_has_the_gradient_of_the_plain_one():
    draws = np.random.default_rng(0)
    x, w, bias, low, g = (
        jnp.asarray(draws.standard_normal(s), jnp.float32) for s in ((2, 5, 6), (4, 6), (4,), (2, 5, 4), (2, 5, 4))
    )
    highest = jax.lax.Precision.HIGHEST
    plain, pull_back = jax.vjp(lambda x, w, bias, low: jnp.dot(x, w.T, precision=highest) + bias + low, x, w, bias, low)
    ours, our_pull_back = jax.vjp(lambda x, w, *addends: ops.product_plus(x, w, addends, highest), x, w, bias, low)
    np.testing.assert_allclose(ours, plain, rtol=1e-6)
    for one, other in zip(our_pull_back(g), pull_back(g), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_full_fine_tuning_reaches_every_parameter(small):
    base, tokens, _, _ = small
    logits, (gradient, none) = logits_and_gradient(CONFIG, base, None, tokens, None)
    assert none is None
    assert jax.tree.structure(gradient) == jax.tree.structure(base)
    for path, value in jax.tree.leaves_with_path(gradient):
        assert np.all(np.isfinite(value)), path
        assert np.abs(value).max() > 0, path
    np.testing.assert_allclose(logits, compiled(CONFIG, base, None, tokens), atol=1e-5)


def test_tied_head_is_the_embedding():
    config = dataclasses.replace(CONFIG, tied_head=True)
    base = jax.eval_shape(lambda: init_base(config, jax.random.key(0)))
    assert "head" not in base
    table, hidden = jnp.arange(12.0).reshape(6, 2), jnp.array([[1.0, -1.0]])
    np.testing.assert_allclose(logits_from_hidden(config, {"embedding": table}, hidden), [[-1.0] * 6])


# --------------------------------------------------------------------------------------------------------- axes, errors


@pytest.mark.parametrize("change", [{}, {"qkv_bias": False, "tied_head": True}])
def test_logical_axes_cover_every_parameter(change):
    config = dataclasses.replace(CONFIG, **change)
    base = jax.eval_shape(lambda: init_base(config, jax.random.key(0)))
    lora = init_lora(config, jax.random.key(0), rank=2, alpha=2.0, targets=TARGETS)
    for weights, axes in ((base, logical_axes(config)), (lora.weights, logical_axes(config, lora))):
        is_names = lambda x: isinstance(x, tuple)  # noqa: E731
        assert jax.tree.structure(axes, is_leaf=is_names) == jax.tree.structure(weights)
        pairs = zip(jax.tree.leaves_with_path(weights), jax.tree.leaves(axes, is_leaf=is_names), strict=True)
        for (path, value), names in pairs:
            assert len(names) == value.ndim, path
            assert all(isinstance(name, str) for name in names), path
            assert (names[0] == "layers") == (path[0].key == "layers"), path
            assert len(set(names)) == len(names), path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float16"}, "config.model.dtype"),
        ({"remat": "some"}, "config.model.remat"),
        ({"num_heads": 5}, "multiple of the 5 heads"),
        ({"num_kv_heads": 3}, "multiple of the 3 key/value heads"),
        ({"mask_token_id": 64}, "mask_token_id 64 lies outside"),
        ({"pad_token_id": -1}, "pad_token_id -1 lies outside"),
    ],
)
def test_bad_config(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({"model_type": "llama"}, "unknown model_type 'llama'"),
        ({}, "unknown model_type None"),
        ({"model_type": "llada", "d_model": 64}, "lacks the key 'vocab_size'"),
        ({"model_type": "llada", "alibi": True}, "sets alibi to True"),
        ({"model_type": "Dream", "hidden_act": "gelu"}, "sets hidden_act to 'gelu'"),
    ],
)
def test_bad_config_json(hf, message):
    with pytest.raises(UserError, match=message):
        read_config(hf)


@pytest.mark.parametrize(
    "change", [{"rank": 0}, {"dropout": 1.0}, {"targets": ("q", "head")}, {"targets": ()}, {"targets": ("q", "q")}]
)
def test_bad_adapter(change):
    with pytest.raises(UserError, match="adapter"):
        init_lora(CONFIG, jax.random.key(0), **({"rank": 2, "alpha": 1.0, "targets": ("q",)} | change))
