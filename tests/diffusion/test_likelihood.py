"""The likelihood bound against enumeration, and the greedy check against the sampler itself."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdsd_jax.denoiser import denoise, init_base, init_lora
from gdsd_jax.diffusion import SamplerConfig, sample
from gdsd_jax.diffusion.likelihood import is_greedy, lower_bound
from gdsd_jax.hub import load_checkpoint

PROMPT, WIDTH = 5, 4


@pytest.fixture(scope="module")
def policy(golden):
    config, _ = load_checkpoint(golden / "llada_tiny")
    config = dataclasses.replace(config, dtype="float32")
    base = jax.tree.map(lambda x: 3 * x if x.ndim > 2 else x, init_base(config, jax.random.key(0)))
    lora = init_lora(config, jax.random.key(1), rank=2, alpha=4.0, targets=("q", "down"))
    return config, base, jax.tree.map(lambda x: x + 0.1, lora)


@pytest.fixture(scope="module")
def batch(policy):
    """Prompts of 3 and 5 tokens, completions of 2 and 4, left-aligned behind them."""
    config, _, _ = policy
    tokens = np.random.default_rng(0).integers(10, config.vocab_size // 2, (2, PROMPT + WIDTH)).astype(np.int32)
    real = np.ones(tokens.shape, bool)
    real[0, :2] = real[0, PROMPT + 2 :] = False
    return tokens, real


def exact_bound(policy, tokens: np.ndarray, real: np.ndarray) -> float:
    """The expectation over every number of masked tokens and every choice of them."""
    config, base, lora = policy
    positions = [p for p in range(PROMPT, PROMPT + WIDTH) if real[p]]
    counts = range(1, len(positions) + 1)
    subsets = [subset for count in counts for subset in itertools.combinations(positions, count)]
    noisy = np.repeat(tokens[None], len(subsets), axis=0)
    for row, subset in enumerate(subsets):
        noisy[row, list(subset)] = config.mask_token_id
    mask = jnp.asarray(np.repeat(real[None], len(subsets), axis=0))
    logp = np.asarray(jax.nn.log_softmax(denoise(config, base, lora, jnp.asarray(noisy), prompt_mask=mask)))
    sums = {count: [] for count in counts}
    for row, subset in enumerate(subsets):
        sums[len(subset)].append(sum(logp[row, p, tokens[p]] for p in subset))
    return sum(np.mean(values) / count for count, values in sums.items())


@pytest.mark.slow
def test_bound_is_the_expectation_over_all_views(policy, batch):
    tokens, real = batch
    draws = 1000
    found = lower_bound(*policy, jnp.asarray(tokens), jnp.asarray(real), jax.random.key(3), width=WIDTH, draws=draws)
    for row in range(2):
        exact = exact_bound(policy, tokens[row], real[row])
        assert found[row] == pytest.approx(exact, rel=0.02)


@pytest.mark.slow
def test_bound_of_one_token_is_its_log_probability_whatever_stands_beside_it(policy, batch):
    tokens, real = (x[:1].copy() for x in batch)
    real[0, PROMPT + 1 :] = False
    alone = exact_bound(policy, tokens[0], real[0])
    call = lambda tokens, real: lower_bound(  # noqa: E731
        *policy, jnp.asarray(tokens), jnp.asarray(real), jax.random.key(0), width=WIDTH, draws=3
    )
    assert call(tokens, real)[0] == pytest.approx(alone, rel=1e-5)
    together = call(np.concatenate([tokens, batch[0][1:]]), np.concatenate([real, batch[1][1:]]))
    assert together[0] == pytest.approx(alone, rel=1e-5)


def test_greedy_is_what_the_sampler_writes(policy):
    config, base, lora = policy
    prompts = np.random.default_rng(1).integers(10, 60, (8, PROMPT)).astype(np.int32)
    sampler = SamplerConfig(completion_length=WIDTH, steps=WIDTH, block_length=WIDTH, strategy="low_confidence")
    tokens = np.array(sample(config, base, lora, prompts, None, jax.random.key(0), sampler).tokens)
    # Half of the rows are changed in one token, each in another place.
    for row in range(4):
        tokens[row, PROMPT + row] = (tokens[row, PROMPT + row] + 1) % 60
    real = jnp.ones(tokens.shape, bool)
    found = is_greedy(config, base, lora, jnp.asarray(tokens), real, width=WIDTH)
    assert found.tolist() == [False] * 4 + [True] * 4
    # Pads behind a completion change nothing.
    padded = jnp.pad(jnp.asarray(tokens), ((0, 0), (0, 4)))
    found = is_greedy(config, base, lora, padded, jnp.pad(real, ((0, 0), (0, 4))), width=2 * WIDTH)
    assert found.tolist() == [False] * 4 + [True] * 4
