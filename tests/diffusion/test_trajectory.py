"""The exact likelihood of rollouts: all trajectories add up to one, and the sampler draws them as often as it says."""

import collections
import dataclasses
import functools
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from gdsd_jax.denoiser import DenoiserConfig, init_base, init_lora
from gdsd_jax.diffusion import Rollout, SamplerConfig, remasking, sample, trajectory_log_prob
from gdsd_jax.diffusion.scoring import read_views
from gdsd_jax.diffusion.trajectory import step_reads, step_views
from gdsd_jax.runtime.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")
V, L = 5, 4  # the last token of the vocabulary is the mask
TINY = DenoiserConfig(
    family="llada", vocab_size=V, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=2, intermediate_size=8,
    max_length=64, rope_theta=1e4, rms_norm_eps=1e-5, qkv_bias=False, tied_head=False, next_token_logits=False,
    mask_token_id=V - 1, eos_token_id=0, pad_token_id=0, dtype="float32",
)  # fmt: skip
PROMPT = np.array([[0, 1, 2]], np.int32)
PROMPT_MASK = np.array([[False, True, True]])
CASES = {
    "low_confidence": {},
    "low_confidence, uneven steps": {"steps": 3, "block_length": 4},
    "low_confidence, hot": {"temperature": 1.7, "steps": 2, "block_length": 4},
    "low_confidence, top_p": {"top_p": 0.8, "steps": 2, "block_length": 4},
    "low_confidence, guidance": {"cfg_scale": 0.7, "steps": 2},
    "low_confidence, suppressed": {"suppress": (1,), "suppress_confidence": (0,), "steps": 2, "block_length": 4},
    "low_confidence, threshold": {"threshold": 0.35},
    "low_confidence, factor": {"factor": 1.3, "block_length": 4},
    "low_confidence, factor, held": {"factor": 1.3, "suppress_confidence": (0, 2)},
    "low_confidence, threshold, held": {"threshold": 0.3, "suppress_confidence": (0, 2)},
    "random": {"strategy": "random", "steps": 2, "block_length": 4},
    "random, held": {"strategy": "random", "steps": 2, "block_length": 4, "suppress_confidence": (0, 2)},
    "random, threshold": {"strategy": "random", "threshold": 0.35},
    "random, threshold, held": {"strategy": "random", "threshold": 0.3, "suppress_confidence": (0, 2)},
    "random, factor": {"strategy": "random", "factor": 1.3, "block_length": 4},
    "random, factor, held": {"strategy": "random", "factor": 1.3, "suppress_confidence": (0, 2)},
    "maskgit_plus": {"strategy": "maskgit_plus", "temperature": 0.8, "top_k": 3, "steps": 3, "block_length": 4},
    "maskgit_plus, top_p": {"strategy": "maskgit_plus", "temperature": 1.3, "top_p": 0.7},
    "maskgit_plus, both cuts": {"strategy": "maskgit_plus", "top_p": 0.9, "top_k": 3, "temperature": 1.4},
    "maskgit_plus, alg_temp": {"strategy": "maskgit_plus", "alg_temp": 0.3, "steps": 3, "block_length": 4},
    "maskgit_plus, alg_temp, held": {"strategy": "maskgit_plus", "alg_temp": 0.2, "suppress_confidence": (0, 2)},
    "maskgit_plus, alg_temp, threshold": {"strategy": "maskgit_plus", "alg_temp": 0.2, "threshold": 0.35},
    "maskgit_plus, factor": {"strategy": "maskgit_plus", "temperature": 1.5, "factor": 1.3, "block_length": 4},
    "topk_margin": {"strategy": "topk_margin", "temperature": 1.2},
    "topk_margin, top_k 1": {"strategy": "topk_margin", "top_k": 2, "steps": 3, "block_length": 4},
    "topk_margin, alg_temp": {"strategy": "topk_margin", "alg_temp": 0.1, "steps": 3, "block_length": 4},
    "topk_margin, threshold": {"strategy": "topk_margin", "threshold": 0.35, "suppress_confidence": (0, 2)},
    "entropy": {"strategy": "entropy", "top_p": 0.9, "steps": 3, "block_length": 4},
    "entropy, alg_temp, held": {"strategy": "entropy", "alg_temp": 0.5, "suppress_confidence": (0, 2)},
    "entropy, alg_temp, factor": {"strategy": "entropy", "alg_temp": 0.5, "factor": 1.3, "block_length": 4},
    "sequential": {"strategy": "sequential", "steps": 3, "block_length": 4},
    "sequential, held": {"strategy": "sequential", "steps": 2, "block_length": 4, "suppress_confidence": (0, 2)},
    "sequential, threshold": {"strategy": "sequential", "threshold": 0.35, "suppress_confidence": (1,)},
    "sequential, factor": {"strategy": "sequential", "factor": 1.3, "temperature": 1.4},
    "origin": {"strategy": "origin", "steps": 3, "block_length": 4},
    "origin, blocks": {"strategy": "origin", "temperature": 1.4},
    "origin, threshold": {"strategy": "origin", "threshold": 0.35},
}  # fmt: skip
FAST = ("low_confidence, factor", "random, threshold, held", "sequential")


def settings(**changes) -> SamplerConfig:
    chosen = {"completion_length": L, "steps": 4, "block_length": 2, "strategy": "low_confidence", "temperature": 1.0}
    return SamplerConfig(**chosen | changes)


@pytest.fixture(scope="module")
def policy():
    base = init_base(TINY, jax.random.key(0))
    base = base | {"embedding": 50 * base["embedding"], "head": 30 * base["head"]}
    lora = init_lora(TINY, jax.random.key(1), rank=2, alpha=4.0, targets=("q", "down"))
    return TINY, base, jax.tree.map(lambda x: x + 0.1, lora)


def orders(config: SamplerConfig) -> np.ndarray:
    """Every commit step that each position might have, `[N, L]`, those of impossible counts included."""
    per_block, size = config.steps_per_block, config.block_length
    early = config.threshold is not None or config.factor is not None
    blocks = []
    for block in range(config.blocks):
        steps = itertools.product(range(per_block), repeat=size)
        # Without a schedule a step commits something until the block is full.
        steps = [s for s in steps if not early or set(s) == set(range(max(s) + 1))]
        blocks.append([tuple(block * per_block + x for x in s) for s in steps])
    return np.array([sum(parts, ()) for parts in itertools.product(*blocks)], np.int32)


@functools.cache
def trajectories(config: SamplerConfig) -> Rollout:
    steps = orders(config)
    tokens = np.array(list(itertools.product(range(V - 1), repeat=L)), np.int32)
    steps, tokens = np.repeat(steps, len(tokens), axis=0), np.tile(tokens, (len(steps), 1))
    prompts = np.repeat(PROMPT, len(tokens), axis=0)
    return Rollout(jnp.asarray(np.concatenate([prompts, tokens], axis=1)), jnp.asarray(steps), jnp.zeros(steps.shape))


def log_probs(policy, config: SamplerConfig, **options) -> np.ndarray:
    rollout = trajectories(config)
    mask = np.repeat(PROMPT_MASK, len(rollout.tokens), axis=0)
    found = trajectory_log_prob(*policy, rollout, mask, config, chunk=3, **options)
    return np.asarray(found, np.float64)


def slow_unless(fast: tuple[str, ...], names: tuple[str, ...]) -> list:
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in fast)) for name in names]


@pytest.mark.parametrize("name", slow_unless(FAST, tuple(CASES)))
def test_all_trajectories_add_up_to_one(policy, name):
    found = log_probs(policy, settings(**CASES[name]))
    assert found.shape == (len(found), settings(**CASES[name]).step_limit)
    assert np.sum(np.exp(found.sum(axis=1))) == pytest.approx(1, abs=1e-6)


def test_ids_that_no_tokenizer_knows_have_no_probability():
    """The sampler never proposes them, so that the others' probabilities still add up to one."""
    config = dataclasses.replace(TINY, vocab_size=V + 3, known_tokens=V)
    base = init_base(config, jax.random.key(0))
    base = base | {"embedding": 50 * base["embedding"], "head": 30 * base["head"]}
    found = log_probs((config, base, None), settings(steps=2, block_length=4))
    assert np.sum(np.exp(found.sum(axis=1))) == pytest.approx(1, abs=1e-6)


# Block-causal attention: the changes of the model and of the sampler. The prompt has two tokens, so that in blocks of
# four the first holds it and the first two tokens of the completion, and the second is cut short.
IN_BLOCKS = {
    "tail of the prompt": ({"block_size": 4}, {"block_length": 4, "threshold": 0.35}),
    "parts, next token": ({"block_size": 4, "next_token_logits": True}, {"threshold": 0.35, "temperature": 1.5}),
    "blocks begin with the completion": ({"block_size": 2, "block_origin": "column"}, {"factor": 1.3}),
    "random order, guidance": ({"block_size": 4}, {"strategy": "random", "threshold": 0.35, "cfg_scale": 0.7}),
}
LISTED = settings(threshold=0.35)  # the same trajectories, as long as pairs of tokens are written one after another


def in_blocks(policy, name: str) -> tuple[tuple, SamplerConfig]:
    model, changes = IN_BLOCKS[name]
    return (dataclasses.replace(TINY, **model), *policy[1:]), settings(**changes)


def log_probs_in_blocks(policy, config: SamplerConfig) -> np.ndarray:
    rollout = trajectories(LISTED)
    mask = np.repeat(PROMPT_MASK, len(rollout.tokens), axis=0)
    return np.asarray(trajectory_log_prob(*policy, rollout, mask, config, chunk=3), np.float64).sum(axis=1)


@pytest.mark.parametrize("name", slow_unless(("tail of the prompt",), tuple(IN_BLOCKS)))
def test_trajectories_in_blocks_add_up_to_one(policy, name):
    found = log_probs_in_blocks(*in_blocks(policy, name))
    assert np.sum(np.exp(found)) == pytest.approx(1, abs=1e-6)
    assert np.sum(np.exp(found) > 1e-4) > 100


@pytest.mark.slow
@pytest.mark.parametrize("name", tuple(IN_BLOCKS))
def test_the_sampler_of_blocks_draws_what_passes_without_a_cache_say(policy, name):
    """The cached sampler at temperature 1, against probabilities of passes over whole texts."""
    policy, config = in_blocks(policy, name)
    agrees(counts(policy, config, 50_000, LISTED), 50_000 * np.exp(log_probs_in_blocks(policy, config)))


def counts(policy, config: SamplerConfig, draws: int, listed: SamplerConfig | None = None) -> np.ndarray:
    """How often the sampler takes each of `trajectories`, those of other settings if they are given."""
    listed = listed or config
    prompts, mask = (np.repeat(x, draws, axis=0) for x in (PROMPT, PROMPT_MASK))
    rollout = sample(*policy, prompts, mask, jax.random.key(5), config)
    commits = np.array(rollout.commit_step)
    if config.threshold is not None or config.factor is not None:
        # A block begins when the slowest row of the batch is through the last one: counted anew in each row.
        for block in range(listed.blocks):
            part = commits[:, block * listed.block_length : (block + 1) * listed.block_length]
            part[:] = [np.unique(row, return_inverse=True)[1] + block * listed.steps_per_block for row in part]
    paths = lambda tokens, commits: map(tuple, np.concatenate([tokens, commits], axis=1).tolist())  # noqa: E731
    drawn = collections.Counter(paths(np.asarray(rollout.tokens)[:, -L:], commits))
    every = trajectories(listed)
    return np.array([drawn[path] for path in paths(np.asarray(every.tokens)[:, -L:], np.asarray(every.commit_step))])


CHECKED = ("low_confidence", "low_confidence, factor", "random, threshold, held", "maskgit_plus, both cuts",
           "maskgit_plus, alg_temp", "topk_margin", "entropy", "origin", "sequential, threshold")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "draws"), [("low_confidence, threshold", 10_000), *((name, 200_000) for name in CHECKED)]
)
def test_the_sampler_draws_each_trajectory_as_often_as_its_likelihood_says(policy, name, draws):
    config = settings(**CASES[name])
    expected = draws * np.exp(log_probs(policy, config).sum(axis=1))
    agrees(counts(policy, config, draws), expected)


def agrees(found: np.ndarray, expected: np.ndarray) -> None:
    """Asserts that counts of draws are those expected, by a test that a right sampler fails once in 1000 seeds."""
    assert found.sum() == round(expected.sum()), "every trajectory is one of those enumerated"
    assert not found[expected == 0].any()
    often = expected >= 5
    observed, expected = (np.append(x[often], x[~often].sum()) for x in (found, expected))
    assert often.sum() > 20
    statistic = np.sum((observed - expected) ** 2 / np.maximum(expected, 1e-9))
    assert scipy.stats.chi2.sf(statistic, often.sum()) > 1e-3


# ----------------------------------------------------------------------------------------------------- one step's rules


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def table_read(logits, target, committed, eligible, config: SamplerConfig, dtype):
    walk = lambda step, start: step(start, logits, jnp.arange(logits.shape[-1]))  # noqa: E731
    reads = step_reads(walk, target, committed, eligible, config, logits.shape[-1], ("step_log_prob",), dtype)
    return jnp.sum(reads["step_log_prob"], axis=-1)


GRADIENTS = ("low_confidence, hot", "low_confidence, factor", "random, held", "maskgit_plus", "maskgit_plus, alg_temp",
             "maskgit_plus, alg_temp, threshold", "topk_margin, alg_temp", "entropy, alg_temp, factor")  # fmt: skip


@pytest.mark.parametrize("name", slow_unless(("low_confidence, hot",), GRADIENTS))
def test_gradients_are_those_of_finite_differences_in_float64(name):
    config = settings(**CASES[name] | {"block_length": 4})
    rng = np.random.default_rng(2)
    size, vocab, rows = 4, 6, 64
    with jax.enable_x64(True):
        logits = jnp.asarray(1.5 * rng.normal(size=(rows, size, vocab)))
        target = jnp.asarray(rng.integers(0, vocab, (rows, size)))
        eligible = jnp.asarray(rng.random((rows, size)) < 0.9)
        committed = eligible & jnp.asarray(rng.random((rows, size)) < 0.5)
        read = jax.jit(functools.partial(table_read, config=config, dtype=jnp.float64))
        weights = jnp.asarray(rng.normal(size=rows))

        def value(logits):
            found = read(logits, target, committed, eligible)
            return jnp.sum(jnp.where(jnp.isfinite(found), weights * found, 0.0))

        assert jnp.sum(jnp.isfinite(read(logits, target, committed, eligible))) > 8
        gradient = jax.grad(value)(logits)
        assert np.all(np.isfinite(gradient)) and np.any(np.asarray(gradient) != 0)
        for direction in rng.normal(size=(3, *logits.shape)):
            h = 1e-6
            slope = (value(logits + h * direction) - value(logits - h * direction)) / (2 * h)
            scale = float(jnp.linalg.norm(gradient)) * np.linalg.norm(direction)
            assert float(jnp.sum(gradient * direction)) == pytest.approx(float(slope), abs=1e-7 * scale)
        # The same in float32, as the scorer computes it.
        single = jax.jit(functools.partial(table_read, config=config, dtype=jnp.float32))
        near = single(logits.astype(jnp.float32), target, committed, eligible)
        np.testing.assert_allclose(near, read(logits, target, committed, eligible), atol=2e-5, rtol=2e-5)


def brute_force(logits, target, committed, eligible, config: SamplerConfig) -> float:
    """Computes the same from every combination of candidates, with the sampler's own `select`."""
    places = np.flatnonzero(eligible)
    combinations = np.array(list(itertools.product(range(logits.shape[-1]), repeat=len(places))))
    tokens = np.tile(target, (len(combinations), 1))
    tokens[:, places] = combinations
    each = jnp.broadcast_to(jnp.asarray(logits), (len(tokens), *logits.shape))
    heat = config.temperature
    drawn = jax.nn.softmax(each / heat)
    probs, confidence = (np.take_along_axis(np.asarray(x), tokens[..., None], 2)[..., 0] for x in
                         (drawn, jax.nn.softmax(each)))  # fmt: skip
    kind = remasking.STRATEGIES[config.strategy]
    score = confidence if kind.score is None else np.asarray(kind.score(drawn, jnp.asarray(probs)))
    if kind.leftmost:
        score = np.broadcast_to(-np.arange(tokens.shape[1], dtype=np.float32), tokens.shape)
    held = np.isin(tokens, config.suppress_confidence)
    score, confidence = (np.where(held, remasking.LOWEST, x) for x in (score, confidence))
    live = jnp.broadcast_to(jnp.asarray(eligible), tokens.shape)
    step = jnp.asarray(0)
    select = jax.jit(remasking.select, static_argnums=0)
    keys = jax.random.split(jax.random.key(0), len(live))
    chosen = select(config, live, jnp.asarray(confidence), jnp.asarray(score), step, keys)
    chosen = np.asarray(chosen)
    fits = (chosen == committed).all(1) & (tokens[:, committed] == target[committed]).all(1)
    return float(np.sum(np.prod(np.where(eligible, probs, 1), axis=1, dtype=np.float64) * fits))


STEPS = ("low_confidence, factor, held", "maskgit_plus, factor", "topk_margin, threshold", "sequential, threshold")


@pytest.mark.parametrize("name", slow_unless(STEPS[:1], STEPS))
def test_a_step_is_the_sum_over_all_candidates_that_select_commits(name):
    config = settings(**CASES[name] | {"block_length": 4})
    rng = np.random.default_rng(3)
    compared = 0
    for _ in range(60):
        logits, target = rng.normal(size=(4, 4)).astype(np.float32), rng.integers(0, 4, 4)
        logits[:, 3] = logits[:, 2] = rng.integers(0, 2, 4)  # ties between tokens and between positions
        eligible = rng.permutation([True, True, True, False])
        committed = eligible & (rng.random(4) < 0.5)
        expected = brute_force(logits, target, committed, eligible, config)
        if committed.any():
            step = map(jnp.asarray, (logits, target, committed, eligible))
            found = table_read(*step, config, jnp.float32)
            assert float(jnp.exp(found)) == pytest.approx(expected, abs=1e-6)
            compared += expected > 0
    assert compared > 5


# ----------------------------------------------------------------------------------------------------- through a model


def rolled_out(policy, config: SamplerConfig) -> tuple[Rollout, np.ndarray]:
    prompts, mask = (np.repeat(x, 6, axis=0) for x in (PROMPT, PROMPT_MASK))
    return sample(*policy, prompts, mask, jax.random.key(2), config), mask


@pytest.mark.slow
@pytest.mark.parametrize("name", ["low_confidence", "low_confidence, guidance"])
def test_micro_batches_of_steps_and_rows_change_nothing(policy, name):
    config = settings(**CASES[name])
    rollout, mask = rolled_out(policy, config)

    def value(lora, rollout, mask, **options):
        found = trajectory_log_prob(*policy[:2], lora, rollout, mask, config, **options)
        return jnp.sum(jnp.sin(found)), found

    gradient = jax.jit(jax.grad(value, has_aux=True), static_argnames=("chunk", "steps_at_once"))
    whole, found = gradient(policy[2], rollout, mask, steps_at_once=config.steps)
    pieces, again = gradient(policy[2], rollout, mask, steps_at_once=1, chunk=2)
    rows = [gradient(policy[2], jax.tree.map(lambda x: x[cut], rollout), mask[cut])  # noqa: B023
            for cut in (slice(0, 3), slice(3, 6))]  # fmt: skip
    np.testing.assert_allclose(again, found, atol=2e-6)
    np.testing.assert_allclose(np.concatenate([f for _, f in rows]), found, atol=2e-6)
    by_rows = jax.tree.map(lambda *x: sum(x), *(g for g, _ in rows))
    for other in (pieces, by_rows):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(y, x, atol=1e-5), whole, other)
    assert max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(whole)) > 1e-3


@pytest.mark.slow
def test_shards_change_nothing():
    """Eight devices, cut along rows, model dimension and heads, against one."""
    script = Path(__file__).parent.parent / "sharded_likelihood.py"
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["devices"] == 8 and found["finite"] and found["largest_gradient"] > 1e-2
    assert found["log_prob"] < 1e-5 and found["gradient"] < 5e-6


def test_what_the_rollout_records_is_what_the_views_read(policy):
    config = settings(temperature=1.3, top_k=3, steps=4, record=True)
    rollout, mask = rolled_out(policy, config)
    plain, _ = rolled_out(policy, dataclasses.replace(config, record=False))
    np.testing.assert_array_equal(plain.tokens, rollout.tokens)
    assert plain.log_prob is None and plain.entropy is None
    steps = jnp.broadcast_to(jnp.arange(4)[:, None], (4, 6))
    views = step_views(rollout.commit_step, steps, PROMPT.shape[1], config)
    names = ("proposal_log_prob", "log_prob", "entropy")
    read = jax.jit(lambda mask: read_views(*policy, rollout.tokens, views, names, prompt_mask=mask, chunk=2))
    reads = read(mask)
    for name, recorded in zip(names, (rollout.log_prob, jnp.log(rollout.confidence), rollout.entropy), strict=True):
        np.testing.assert_allclose(jnp.sum(reads[name], axis=0), recorded, atol=1e-5, err_msg=name)


def test_steps_after_the_last_row_has_ended_were_not_taken(policy):
    config = settings(strategy="random", stop_at_eos=True, suppress=(1, 2, 3))
    rollout, mask = rolled_out(policy, config)
    # Of nothing but ends, the first block is enough; the rest is filled in, and drawn from nothing.
    assert np.max(np.asarray(rollout.commit_step), axis=1).tolist() == [config.step_limit] * 6
    found = np.asarray(trajectory_log_prob(*policy, rollout, mask, config))
    np.testing.assert_allclose(found, [[-np.log(2), 0, 0, 0]] * 6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forbid_mask": False}, "forbid_mask=False lets a position be written again"),
        ({"temperature": 0.0}, "temperature 0 draws nothing"),
        ({"strategy": "origin", "suppress_confidence": (0,)}, "a step that commits nothing depends on the policy too"),
        ({"cache": "dual"}, "cache='dual' decodes from keys and values of earlier steps"),
        ({"completion_length": 8}, "pass the SamplerConfig that the rollout was sampled with"),
    ],
)
def test_what_is_not_defined_is_refused(policy, changes, message):
    rollout = jax.tree.map(lambda x: x[:2], trajectories(settings()))
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        trajectory_log_prob(*policy, rollout, None, settings(**changes))
    assert "\n" not in str(caught.value)
