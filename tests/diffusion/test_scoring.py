"""The scorer: chunked reads against a naive float64 computation, coupled pairs, and the memory XLA plans for it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdsd_jax.denoiser import DenoiserConfig, init_base, init_lora
from gdsd_jax.diffusion import masking
from gdsd_jax.diffusion.divergence import divergence
from gdsd_jax.diffusion.scoring import Views, read_tokens, read_views, target_and_normaliser

CONFIG = DenoiserConfig(
    family="llada",
    vocab_size=48,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    intermediate_size=24,
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
READS = ("log_prob", "centred", ("centred_top_k", 20), "entropy")
SCALES = (1.0, -0.5, 0.3, 2.0)
# Unoptimised machine code: these programs run once, and compile in half the time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def case(vocab: int, seed: int = 0):
    """A head, hidden states [2, 5, D] and targets, with logits of a spread of 1."""
    rng = np.random.default_rng(seed)
    head = rng.standard_normal((vocab, 16), np.float32) / 4
    hidden = rng.standard_normal((2, 5, 16), np.float32)
    targets = rng.integers(0, vocab, (2, 5), dtype=np.int32)
    return jnp.asarray(head), jnp.asarray(hidden), jnp.asarray(targets)


def naive(head, hidden, targets):
    """The four reads from all logits at once, in float64."""
    z = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    target = np.take_along_axis(z, np.asarray(targets)[..., None], axis=-1)[..., 0]
    top = z.max(axis=-1, keepdims=True)
    normaliser = top[..., 0] + np.log(np.exp(z - top).sum(axis=-1))
    log_p = z - normaliser[..., None]
    return {
        "log_prob": target - normaliser,
        "centred": target - z.mean(axis=-1),
        ("centred_top_k", 20): target - np.sort(z, axis=-1)[..., -20:].mean(axis=-1),
        "entropy": -(np.exp(log_p) * log_p).sum(axis=-1),
    }


@functools.partial(jit, static_argnums=0)
def read_and_gradient(chunk, head, hidden, targets):
    """All reads, and the gradient of an uneven sum of them."""
    config = dataclasses.replace(CONFIG, vocab_size=len(head))

    def total(head, hidden):
        reads = read_tokens(config, {"head": head}, hidden, targets, READS, chunk=chunk)
        weights = jnp.arange(1.0, 1 + targets.size).reshape(targets.shape) / targets.size
        values = [reads[r] for r in READS]
        return sum(scale * jnp.sum(weights * value) for scale, value in zip(SCALES, values, strict=True)), values

    (_, values), gradient = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(head, hidden)
    return values, gradient


@pytest.fixture(scope="module")
def unchunked():
    return {vocab: read_and_gradient(10**6, *case(vocab)) for vocab in (47, 48)}


# 47 is prime: a chunk leaves a rest. 48 is divided by 16 and 24; a chunk of 20 gives way to the divisor 16.
@pytest.mark.parametrize(("vocab", "chunk"), [(48, 16), (48, 20), (48, 24), (47, 16), (47, 40), (47, 47), (48, 1000)])
def test_reads_against_float64_and_gradients_against_unchunked(vocab, chunk, unchunked):
    reads, gradient = read_and_gradient(chunk, *case(vocab))
    expected = naive(*case(vocab))
    for name, value in zip(READS, reads, strict=True):
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected[name], atol=1e-5, rtol=0, err_msg=str(name))
    for a, b in zip(gradient, unchunked[vocab][1], strict=True):
        # Sums in another order, rounded as the largest of them are.
        np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max(), rtol=0)


def test_gradient_against_finite_differences_in_float64(unchunked):
    head, hidden, targets = case(48)
    direction = np.random.default_rng(1).standard_normal(hidden.shape)
    weights = np.arange(1.0, 1 + targets.size).reshape(targets.shape) / targets.size

    def total(step):
        reads = naive(head, np.asarray(hidden, np.float64) + step * direction, targets)
        return sum(scale * (weights * reads[r]).sum() for scale, r in zip(SCALES, READS, strict=True))

    numeric = (total(1e-6) - total(-1e-6)) / 2e-6
    analytic = np.sum(np.asarray(unchunked[48][1][1], np.float64) * direction)
    np.testing.assert_allclose(analytic, numeric, rtol=1e-5)


def test_top_k_of_the_whole_vocabulary_is_centred():
    head, hidden, targets = case(48)
    for k in (48, 1000):
        reads = read_tokens(CONFIG, {"head": head}, hidden, targets, (("centred_top_k", k), "centred"), chunk=16)
        np.testing.assert_array_equal(reads["centred_top_k", k], reads["centred"])


def test_a_constant_on_all_logits_changes_no_read():
    """`head + 1 v^T` adds `h . v` to every logit of a position, which only differences between logits do not see."""
    head, hidden, targets = case(48)
    shift = np.random.default_rng(2).standard_normal(16, np.float32)
    assert np.abs(hidden @ shift).max() > 3
    plain, _ = read_and_gradient(16, head, hidden, targets)
    shifted, _ = read_and_gradient(16, head + shift, hidden, targets)
    for a, b in zip(plain, shifted, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)


def test_bfloat16_sums_in_float32():
    """The logits are rounded products, but what is summed over the vocabulary is not rounded again."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    head, hidden, targets = case(48)
    head, hidden = head.astype(jnp.bfloat16), hidden.astype(jnp.bfloat16)
    reads = read_tokens(config, {"head": head}, hidden, targets, ("log_prob", "entropy"), chunk=16)
    expected = naive(head.astype(jnp.float32), hidden.astype(jnp.float32), targets)
    for name in ("log_prob", "entropy"):
        assert reads[name].dtype == jnp.float32
        np.testing.assert_allclose(reads[name], expected[name], atol=1e-4)


@pytest.mark.parametrize("chunk", [16, 20, 64])
def test_target_and_normaliser_have_their_gradients(chunk):
    """Of hidden states and head alike, with logits whose maximum moves from chunk to chunk; the mean logit has none."""
    head, hidden, targets = case(48)
    head = head * jnp.linspace(1.0, 12.0, 48)[:, None]
    weights = jnp.arange(1.0, 11.0).reshape(2, 5)
    highest = jax.lax.Precision.HIGHEST

    def plain(hidden, head):
        z = jnp.einsum("...d,vd->...v", hidden, head, precision=highest)
        target = jnp.take_along_axis(z, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(weights * jax.nn.logsumexp(z, axis=-1) - 0.7 * target)

    def ours(hidden, head):
        target, normaliser, mean_logit = target_and_normaliser(hidden, head, targets, highest, chunk)
        return jnp.sum(weights * (normaliser + jax.lax.stop_gradient(mean_logit)) - 0.7 * target), mean_logit

    (_, mean_logit), gradient = jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))(hidden, head)
    z = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    p = np.exp(z - z.max(axis=-1, keepdims=True))
    np.testing.assert_allclose(mean_logit, (p * z).sum(axis=-1) / p.sum(axis=-1), rtol=1e-5)
    for one, other in zip(gradient, jit(jax.grad(plain, argnums=(0, 1)))(hidden, head), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


CONFIDENT = [(("log_prob",), 1000), (("log_prob",), 16), (("log_prob", "entropy"), 16)]


@pytest.mark.parametrize(("reads", "chunk"), CONFIDENT)
def test_gradient_of_confident_tokens_in_bfloat16(reads, chunk):
    """At `p = 0.999` the token's row and the mean row differ by a thousandth, less than the error of rounding both."""
    rng = np.random.default_rng(3)
    head = jnp.asarray(rng.standard_normal((48, 64)) / 4, jnp.bfloat16)
    targets = jnp.asarray(rng.integers(0, 48, (2, 20)))
    rows = np.asarray(head, np.float64)[targets]
    # Along a token's own row its logit grows, until it has about p = 0.999.
    hidden = jnp.asarray(rng.standard_normal((2, 20, 64)) / 8 + 2.8 * rows, jnp.bfloat16)

    def gradient(dtype):
        config = dataclasses.replace(CONFIG, dtype=dtype)
        read = lambda hidden: read_tokens(config, {"head": head.astype(dtype)}, hidden, targets, reads, chunk=chunk)  # noqa: E731
        of = jit(jax.grad(lambda hidden: jnp.sum(read(hidden)["log_prob"])))(hidden.astype(dtype))
        return np.asarray(of, np.float64), np.exp(np.asarray(jit(read)(hidden.astype(dtype))["log_prob"]))

    (found, _), (true, p) = gradient("bfloat16"), gradient("float32")
    assert 0.997 < np.median(p) < 0.9999
    error = np.linalg.norm(found - true, axis=-1) / np.linalg.norm(true, axis=-1)
    assert error.mean() < 0.01 and error.max() < 0.03, error


@pytest.mark.parametrize("reads", [("log_prob",), ("log_prob", ("centred_top_k", 8)), ("centred",)])
def test_gradient_of_a_trained_head_in_bfloat16(reads):
    """Most tokens are the same, as the tail of EOS is: a sum in bfloat16 stops growing after a few hundred of them."""
    rng = np.random.default_rng(4)
    head = jnp.asarray(rng.standard_normal((48, 16)) / 4, jnp.float32)
    hidden = jnp.asarray(rng.standard_normal((4096, 16)) + 1, jnp.bfloat16)
    targets = jnp.asarray(np.where(rng.random(4096) < 0.8, 1, rng.integers(0, 48, 4096)))

    def gradient(dtype):
        config = dataclasses.replace(CONFIG, dtype=dtype)
        low = head.astype(jnp.bfloat16).astype(jnp.float32)
        total = lambda head: sum(  # noqa: E731
            jnp.sum(value)
            for value in read_tokens(config, {"head": head}, hidden.astype(dtype), targets, reads, chunk=16).values()
        )
        return np.asarray(jit(jax.grad(total))(low), np.float64)

    found, true = gradient("bfloat16"), gradient("float32")
    cosine = np.sum(found * true) / np.linalg.norm(found) / np.linalg.norm(true)
    assert cosine > 0.9999
    assert np.linalg.norm(found - true) / np.linalg.norm(true) < 0.01


def test_entropy_value_is_entropy_without_a_gradient():
    head, hidden, targets = case(48)

    @functools.partial(jit, static_argnums=1)
    def value(hidden, name):
        read = lambda hidden: jnp.sum(  # noqa: E731
            read_tokens(CONFIG, {"head": head}, hidden, targets, ("log_prob", name), chunk=16)[name]
        )
        return jax.value_and_grad(read)(hidden)

    (one, gradient), (other, none) = value(hidden, "entropy"), value(hidden, "entropy_value")
    np.testing.assert_allclose(one, other, rtol=1e-6)
    assert np.abs(gradient).max() > 1e-3
    np.testing.assert_array_equal(none, 0)


# -------------------------------------------------------------------------------------------------------- coupled pairs


@pytest.fixture(scope="module")
def base():
    return init_base(CONFIG, jax.random.key(0))


def test_coupled_pair_read_once_equals_both_views_read_apart(base):
    """Selecting the hidden state before the head gives what two reads, combined where each is masked, give."""
    prompt, length, rows = 3, 6, 4
    lora = init_lora(CONFIG, jax.random.key(1), rank=2, alpha=4.0, targets=("q", "down"))
    lora = jax.tree.map(lambda x: x + 0.2, lora)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(4, CONFIG.vocab_size, (rows, prompt + length), dtype=np.int32))
    masked = masking.behind_prompt(jnp.asarray(rng.random((rows, length)) < 0.5), prompt)
    both = jnp.stack([masked, masking.complement(masked, prompt)])
    weights = jnp.asarray(rng.random((1, rows, length), np.float32))
    completion = both[:, :, prompt:]

    def together(lora):
        views = Views(both, weights, ((0, 1),))
        reads = read_views(CONFIG, base, lora, tokens, views, ("log_prob", "centred"), chunk=16)
        return jnp.sum(weights * (reads["log_prob"] + 0.5 * reads["centred"]))

    def apart(lora):
        views = Views(both, jnp.concatenate([weights, weights]) * completion, ((0,), (1,)))
        reads = read_views(CONFIG, base, lora, tokens, views, ("log_prob", "centred"), chunk=16)
        return jnp.sum(views.weights * (reads["log_prob"] + 0.5 * reads["centred"]))

    loss, gradient = jit(jax.value_and_grad(together))(lora)
    expected_loss, expected = jit(jax.value_and_grad(apart))(lora)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    scale = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    assert scale > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * scale, rtol=0), gradient, expected)


def test_a_token_that_no_view_masks_is_read_in_the_last(base):
    tokens = jnp.arange(4, 12).reshape(1, 8)
    none = jnp.zeros((2, 1, 8), bool)
    last = none.at[1, 0, 0].set(True)  # in the prompt: changes what the second pass sees, not where tokens are read
    weights = jnp.ones((1, 1, 4))

    def read(masked, sources):
        return read_views(CONFIG, base, None, tokens, Views(masked, weights, sources), ("log_prob",))["log_prob"]

    pair, single = jit(lambda: (read(last, ((0, 1),)), read(last[1:], ((0,),))))()
    np.testing.assert_allclose(pair, single, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- memory

VOCAB, TOKENS = 126464, 2 * 64
SMALL_CHUNK, LARGE_CHUNK = 3952, 31616  # both divide 126464 = 2^9 * 13 * 19, and 31616 = 8 * 3952


@functools.cache
def planned(gradient: bool, vocab: int, chunk: int, entropy: str = "entropy") -> int:
    """Bytes of temporaries of the compiled scorer, or of its gradient in the hidden states, as XLA plans them."""
    config = dataclasses.replace(CONFIG, vocab_size=vocab, hidden_size=32)
    hidden = jax.ShapeDtypeStruct((2, TOKENS // 2, 32), jnp.float32)
    targets = jax.ShapeDtypeStruct((2, TOKENS // 2), jnp.int32)
    base = {"head": jax.ShapeDtypeStruct((vocab, 32), jnp.float32)}

    def total(hidden, base, targets):
        reads = read_tokens(config, base, hidden, targets, ("log_prob", "centred", entropy), chunk=chunk)
        return sum(jnp.sum(value) for value in reads.values())

    program = jax.jit(jax.grad(total) if gradient else total)
    return program.lower(hidden, base, targets).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("gradient", "entropy"),
    [
        pytest.param(False, "entropy", marks=pytest.mark.slow),
        (True, "entropy"),
        pytest.param(True, "entropy_value", marks=pytest.mark.slow),
    ],
)
def test_memory_grows_with_the_chunk_not_with_the_vocabulary(gradient, entropy):
    logits = TOKENS * VOCAB * 4
    small, large = (planned(gradient, VOCAB, chunk, entropy) for chunk in (SMALL_CHUNK, LARGE_CHUNK))
    of_chunk = TOKENS * SMALL_CHUNK * 4
    assert of_chunk < small < 5 * of_chunk
    assert 6 * small < large < 9 * small
    assert small < logits / 7
    assert planned(gradient, 2 * VOCAB, SMALL_CHUNK, entropy) < 1.05 * small
    assert planned(gradient, VOCAB, VOCAB, entropy) > logits


@pytest.mark.parametrize("chunk", [48, 17])
def test_the_divergence_sums_over_the_whole_vocabulary(chunk):
    head, hidden, _ = case(CONFIG.vocab_size)
    other = hidden[::-1] * 3
    dtype = dataclasses.replace(CONFIG, dtype="float32")
    measure = jit(lambda hidden, other: divergence(dtype, {"head": head}, hidden, other, chunk=chunk))
    z, z_other = (np.asarray(h, np.float64) @ np.asarray(head, np.float64).T for h in (hidden, other))
    log_p, log_q = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in (z, z_other))
    expected = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    assert expected.min() > 0.01
    np.testing.assert_allclose(measure(hidden, other), expected, rtol=1e-5, atol=1e-6)
    assert (measure(hidden, hidden) == 0).all()


def test_a_policy_has_no_divergence_from_itself():
    """Also where rounding differs from chunk to chunk."""
    head, hidden, _ = case(3000)
    head = 8 * head
    measure = jit(lambda hidden: divergence(CONFIG, {"head": head}, hidden, hidden, chunk=517))
    assert (measure(hidden) == 0).all()
