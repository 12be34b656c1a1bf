"""The forward process, as properties: how many tokens are masked, which ones, and that the prompt never is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdsd_jax.diffusion import masking
from gdsd_jax.runtime.errors import UserError

ROWS, LENGTH, BLOCK = 5, 12, 4
keys = st.integers(0, 2**32 - 1).map(jax.random.key)
counts = st.lists(st.integers(0, LENGTH), min_size=ROWS, max_size=ROWS).map(lambda x: np.array(x, np.int32))
few = settings(max_examples=40)


@few
@given(k=st.integers(0, 64), rows=st.sampled_from([1, 2, 4, 7, 13, 16]), length=st.sampled_from([1, 5, 12, 64]))
def test_stratified_counts_cover_evenly(k, rows, length):
    """Around the circle of the L + 1 counts, neighbours are as far apart as rows points can evenly be."""
    k = k % (length + 1)
    x = np.asarray(masking.stratified_counts(k, rows, length))
    assert x[0] == k
    assert x.min() >= 0 and x.max() <= length
    if rows > 1:
        gaps = np.diff(np.append(x, k)) % (length + 1)
        assert set(gaps) <= {np.floor((length + 1) / rows), np.ceil((length + 1) / rows)}
    if rows == length + 1:
        assert set(x) == set(range(length + 1))


def test_stratified_counts_round_half_to_even():
    np.testing.assert_array_equal(masking.stratified_counts(0, 4, 9), [0, 2, 5, 8])
    np.testing.assert_array_equal(masking.stratified_counts(7, 4, 9), [7, 0, 2, 4])


@functools.cache
def compiled(name, **static):
    return jax.jit(functools.partial(getattr(masking, name), **static))


@few
@given(key=keys, counts=counts)
def test_at_random_masks_exactly(key, counts):
    masked = jax.jit(masking.at_random, static_argnums=2)(key, counts, LENGTH)
    np.testing.assert_array_equal(masked.sum(axis=1), counts)


def test_at_random_is_uniform_over_positions():
    draw = jax.vmap(lambda key: masking.at_random(key, jnp.full(ROWS, 3), LENGTH))
    share = np.asarray(jax.jit(draw)(jax.random.split(jax.random.key(0), 4000))).mean(axis=(0, 1))
    np.testing.assert_allclose(share, 3 / LENGTH, atol=0.015)


@few
@given(key=keys, counts=counts, spread=st.sampled_from([0, 1, 3]), tied=st.booleans(), known=st.booleans())
def test_rollout_order(key, counts, spread, tied, known):
    confidence_key, key = jax.random.split(key)
    confidence = jax.random.uniform(confidence_key, (ROWS, LENGTH))
    if tied:
        confidence = jnp.round(confidence * (spread + 1))
    order = compiled("in_rollout_order", block_length=BLOCK, length=LENGTH)
    masked = np.asarray(order(key, counts, confidence if known else None))
    np.testing.assert_array_equal(masked.sum(axis=1), counts)
    for row, x, values in zip(masked, counts, np.asarray(confidence), strict=True):
        blocks = row.reshape(-1, BLOCK)
        whole, part = divmod(int(x), BLOCK)
        first = len(blocks) - whole
        assert blocks[first:].all()
        assert not blocks[: max(first - 1, 0)].any()
        if first > 0:
            chosen, of_block = blocks[first - 1], values.reshape(-1, BLOCK)[first - 1]
            assert chosen.sum() == part
            if known and part > 0:
                assert of_block[chosen].max() <= of_block[~chosen].min()


def test_rollout_order_without_confidence_is_uniform_inside_the_block():
    draw = jax.vmap(lambda key: masking.in_rollout_order(key, jnp.array([5]), None, BLOCK, LENGTH)[0])
    share = np.asarray(jax.jit(draw)(jax.random.split(jax.random.key(0), 4000))).mean(axis=0)
    np.testing.assert_array_equal(share[:4], 0)
    np.testing.assert_allclose(share[4:8], 1 / BLOCK, atol=0.03)
    np.testing.assert_array_equal(share[8:], 1)


def test_rollout_order_needs_whole_blocks():
    with pytest.raises(UserError, match="block_length 5"):
        masking.in_rollout_order(jax.random.key(0), jnp.array([3]), None, 5, LENGTH)


@pytest.mark.parametrize("block", [None, BLOCK])
def test_stratified_draw_covers_every_group(block):
    draw = functools.partial(masking.stratified, rows=26, length=LENGTH, stratum=13, block_length=block)
    count = jax.jit(jax.vmap(lambda key: draw(key).sum(axis=1)))
    totals = count(jax.random.split(jax.random.key(0), 8)).reshape(16, 13)
    np.testing.assert_array_equal(np.sort(totals, axis=1), np.tile(np.arange(13), (16, 1)))
    assert len({tuple(row) for row in np.asarray(totals)}) > 1


@few
@given(key=keys, ratio=st.floats(0.0, 1.0))
def test_complement(key, ratio):
    prompt = 3
    masked = masking.behind_prompt(masking.bernoulli(key, ratio, ROWS, LENGTH), prompt)
    other = masking.complement(masked, prompt)
    assert masked.shape == other.shape == (ROWS, prompt + LENGTH)
    assert not masked[:, :prompt].any() and not other[:, :prompt].any()
    assert (masked ^ other)[:, prompt:].all()
    np.testing.assert_array_equal(masking.complement(other, prompt), masked)


def test_bernoulli_rate():
    ratio = jnp.array([[0.0], [0.1], [0.5], [0.9], [1.0]])
    share = np.asarray(masking.bernoulli(jax.random.key(0), ratio, 5, 20000)).mean(axis=1)
    assert share[0] == 0 and share[-1] == 1
    np.testing.assert_allclose(share, ratio[:, 0], atol=0.015)
