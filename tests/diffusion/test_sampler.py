"""The sampler: token for token against recorded traces, then its rules one by one on tiny models."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import optimised

from gdsd_jax.denoiser import DenoiserConfig, denoise, init_base, init_lora, pick
from gdsd_jax.diffusion import SamplerConfig, proposals, remasking, sample, sampler
from gdsd_jax.diffusion.proposals import propose, propose_at
from gdsd_jax.diffusion.step import finished
from gdsd_jax.hub import load_checkpoint
from gdsd_jax.runtime.errors import UserError

SAMPLERS = Path(__file__).parents[1] / "golden" / "samplers"
CASES = {
    f"{family}_{name}": case
    for family in ("llada", "dream")
    for name, case in json.loads((SAMPLERS / f"{family}_cases.json").read_text()).items()
}
select = jax.jit(remasking.select, static_argnums=0)
# Those that plan a block ahead are held against their authors' samplers in test_models2_golden.
STRATEGIES = tuple(name for name, strategy in remasking.STRATEGIES.items() if strategy.plan is None)

TINY = DenoiserConfig(
    family="llada", vocab_size=12, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, intermediate_size=16,
    max_length=64, rope_theta=1e4, rms_norm_eps=1e-5, qkv_bias=False, tied_head=False, next_token_logits=False,
    mask_token_id=11, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
PROMPTS = jnp.arange(1, 10).reshape(3, 3)


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def checkpoints(golden):
    return {family: load_checkpoint(golden / f"{family}_tiny") for family in ("llada", "dream")}


@pytest.fixture(scope="module")
def base():
    base = jax.jit(init_base, static_argnums=0)(TINY, jax.random.key(0))
    return base | {"embedding": 50 * base["embedding"], "head": 50 * base["head"]}


@pytest.fixture(scope="module")
def flat(base):
    """A model whose logits are all zero: the argmax is token 0 (here EOS), a draw is uniform."""
    return base | {"final_norm": jnp.zeros_like(base["final_norm"])}


def keys_of(rows):
    """A key for each row."""
    return jax.random.split(jax.random.key(0), len(rows))


def settings(**changes) -> SamplerConfig:
    return SamplerConfig(
        **{"completion_length": 8, "steps": 4, "block_length": 4, "strategy": "low_confidence"} | changes
    )


def commits(rollout, steps):
    """[B, steps]: positions written last at each step."""
    return (np.asarray(rollout.commit_step)[:, :, None] == np.arange(steps)).sum(1)


# Variants of a strategy whose plain case is in the fast tier.
VARIANTS = {
    "llada_c_blocks_uneven2", "llada_d_more_steps_than_tokens", "llada_h_one_step_per_block", "llada_k_trainer_leftpad",
    "llada_l_trainer_fewer_steps_than_blocks", "dream_b_maskgit_10", "dream_e_entropy_7", "dream_g_maskgit_leftpad",
    "dream_h_entropy_more_steps_than_tokens", "dream_k_entropy_one_step", "dream_l_margin_eps",
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in VARIANTS else []) for name in CASES]
)
def test_recorded_trace_at_every_step(checkpoints, name):
    case, trace = CASES[name], np.load(SAMPLERS / f"{name}.npz")
    config, base = checkpoints[name.split("_")[0]]
    config = dataclasses.replace(config, mask_token_id=case["mask_id"])
    rollout = sample(
        config,
        base,
        None,
        trace["prompt"],
        trace["attention_mask"].astype(bool) if case["attention_mask"] else None,
        jax.random.key(0),
        SamplerConfig(
            completion_length=case["gen_length"],
            steps=case["steps"],
            block_length=case.get("block_length", case["gen_length"]),
            strategy=case.get("remasking") or case["alg"],
            forbid_mask=False,
            **{k: case[k] for k in ("cfg_scale", "eps", "top_p", "top_k") if k in case},
        ),
    )
    for step, tokens in enumerate(trace["x_history"], start=-1):
        np.testing.assert_array_equal(sampler.replay(rollout, config, step), tokens, err_msg=f"after step {step}")
    np.testing.assert_array_equal(rollout.tokens, trace["x_final"])
    assert (rollout.tokens == config.mask_token_id).sum() == case["masks_left_in_final"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_confidence_and_padding(checkpoints, family):
    """Confidences are those of the state before the commit; more left padding changes nothing."""
    config, base = checkpoints[family]
    strategy = {"llada": "low_confidence", "dream": "entropy"}[family]
    config_of_run = settings(strategy=strategy, completion_length=16, block_length=8, steps=8)
    prompts, key = np.arange(10, 28, dtype=np.int32).reshape(2, 9), jax.random.key(0)
    rollout = sample(config, base, None, prompts, None, key, config_of_run)

    logits_of = jax.jit(lambda tokens: denoise(config, base, None, tokens)[:, 9:])
    for step in range(8):
        logits = logits_of(sampler.replay(rollout, config, step - 1))
        probs = jax.nn.softmax(logits.at[..., config.mask_token_id].set(-jnp.inf))
        expected = jnp.take_along_axis(probs, rollout.tokens[:, 9:, None], axis=-1)[..., 0]
        here = rollout.commit_step == step
        np.testing.assert_allclose(rollout.confidence[here], expected[here], atol=1e-5)

    padded = np.pad(prompts, ((0, 0), (5, 0)), constant_values=config.pad_token_id)
    again = sample(config, base, None, padded, np.arange(14) >= np.array([[5], [5]]), key, config_of_run)
    np.testing.assert_array_equal(again.tokens[:, 5:], rollout.tokens)
    np.testing.assert_array_equal(again.commit_step, rollout.commit_step)


# What these rank by is held against recorded traces.
TRACED = {"topk_margin", "maskgit_plus"}


@pytest.mark.parametrize(
    "strategy", [pytest.param(name, marks=[pytest.mark.slow] if name in TRACED else []) for name in STRATEGIES]
)
def test_every_strategy_fills_blocks_left_to_right(base, strategy):
    run = settings(strategy=strategy, temperature=1.0, steps=6)
    rollout = sample(TINY, base, None, PROMPTS, None, jax.random.key(1), run)
    np.testing.assert_array_equal(rollout.tokens[:, :3], PROMPTS)
    assert (rollout.tokens != TINY.mask_token_id).all()
    assert ((rollout.confidence > 0) & (rollout.confidence <= 1)).all()
    steps = np.asarray(rollout.commit_step)
    assert (steps[:, :4] // 3 == 0).all() and (steps[:, 4:] // 3 == 1).all()
    if not remasking.STRATEGIES[strategy].timed:
        assert (commits(rollout, 6) == [2, 1, 1, 2, 1, 1]).all()
    elif strategy != "origin":
        # 4 masked: floor(4 / 3), floor(3 * 0.4995), the rest.
        assert (commits(rollout, 6) == [1, 1, 2, 1, 1, 2]).all()


def test_origin_commits_each_token_by_itself(base):
    run = settings(completion_length=4, steps=4, strategy="origin", temperature=1.0)
    rollout = sample(TINY, base, None, jnp.ones((2000, 1), jnp.int32), None, jax.random.key(0), run)
    share = commits(rollout, 4).mean(0) / 4
    # A quarter at each step, up to eps; the standard deviation of each share is 0.0048.
    np.testing.assert_allclose(share, 0.25, atol=0.02)


CUTS = {"top_p": 0.7}, {"top_k": 4}


@pytest.mark.parametrize(
    "cut", [{}, *(pytest.param(cut, marks=pytest.mark.slow) for cut in CUTS), {"top_p": 0.8, "top_k": 3}], ids=str
)
def test_draws_follow_the_cut_distribution(cut):
    count, vocab = 1_000_000, 300
    logits = 3 * jax.random.normal(jax.random.key(3), (vocab,))
    logits = logits.at[7].set(-jnp.inf)
    run = settings(temperature=1.5, **cut)
    uniform = jax.random.uniform(jax.random.key(4), (count, 2))
    # One distribution for all draws: the vocabulary is cut once, the draw is repeated.
    draw = lambda u: proposals.candidates(logits, u, run)[0]  # noqa: E731
    with optimised(True):
        tokens = np.asarray(jax.jit(lambda u: jax.lax.map(draw, u, batch_size=50_000))(uniform))

    scaled = np.asarray(logits, np.float64) / 1.5
    probs = np.exp(scaled - scaled.max())
    order = np.argsort(-probs)
    if "top_p" in cut:
        sorted_probs = probs[order] / probs.sum()
        probs[order[np.cumsum(sorted_probs) - sorted_probs > cut["top_p"]]] = 0
    probs[order[cut.get("top_k", vocab) :]] = 0
    expected = count * probs / probs.sum()

    counts = np.bincount(tokens, minlength=vocab)
    assert (counts[expected == 0] == 0).all()
    common = expected >= 10
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    freedom = max(1, (expected > 0).sum() - 1)
    statistic = (((observed - expected) ** 2)[expected > 0] / expected[expected > 0]).sum()
    assert statistic < freedom + 4.5 * np.sqrt(2 * freedom)


def test_draw_at_the_edges_takes_no_impossible_token():
    probs = jnp.zeros((2, 300)).at[:, 131].set(0.25).at[:, 290].set(0.75)
    almost_one = np.nextafter(np.float32(1), np.float32(0))
    draw = jax.jit(lambda probs, uniform: proposals.draw(jnp.log(probs), proposals.grouped(jnp.log(probs)), uniform))
    np.testing.assert_array_equal(draw(probs, jnp.array([[0.0, 0.0], [almost_one, almost_one]])), [131, 290])
    many = jnp.full((126_464,), 1e-5).at[-5:].set(0)
    assert draw(many, jnp.full(2, almost_one)) < 126_459


def test_every_token_of_a_thin_tail_can_be_drawn():
    """Behind a token of 0.999, with all numbers of 23 bits that fall behind it, each of the others in proportion."""
    tail = 3 * np.random.default_rng(0).standard_normal(127 * 8)
    tail += np.log(1e-3) - np.log(np.exp(tail).sum())
    # The first group holds the likely token alone.
    logits = jnp.asarray(np.concatenate([[np.log(0.999)], np.full(127, -np.inf), tail]), jnp.float32)
    first = np.arange(np.ceil(0.999 * 2**23) + 1, 2**23) / 2**23
    second = np.random.default_rng(1).random((10, len(first)))
    uniform = jnp.asarray(np.stack([np.broadcast_to(first, second.shape), second], axis=-1).reshape(-1, 2), jnp.float32)
    one = lambda uniform: proposals.draw(logits, proposals.grouped(logits), uniform)  # noqa: E731
    with optimised(True):
        draw = jax.jit(lambda uniform: jax.lax.map(one, uniform, batch_size=20_000))
    counts = np.bincount(np.asarray(draw(uniform)) - 128, minlength=len(tail))
    expected = len(uniform) * np.exp(tail) / 1e-3
    # One number for both sums would draw some tokens ten times and others never.
    common = expected > 5
    statistic = ((counts - expected) ** 2 / expected)[common].sum()
    assert statistic < 1.3 * common.sum()
    assert counts[~common].sum() == pytest.approx(expected[~common].sum(), rel=0.1)


@pytest.mark.parametrize("size", [5, 128, 300])
def test_best_token_and_its_probability(size):
    """Takes the first of equal logits, in whichever group it is; never a banned one."""
    logits = np.random.default_rng(size).integers(0, 4, (50, size)).astype(np.float32)
    logits[:, 2] = 9.0
    banned = jax.jit(lambda logits: proposals.ban(logits, (2,)))(logits)
    logits[:, 2] = -np.inf
    np.testing.assert_array_equal(banned, logits)
    token, confidence, _ = jax.jit(lambda logits: proposals.candidates(logits, jnp.zeros((50, 2)), settings()))(banned)
    np.testing.assert_array_equal(token, logits.argmax(-1))
    np.testing.assert_allclose(confidence, jax.nn.softmax(logits)[np.arange(50), token], rtol=1e-6)


def test_sampled_tokens_follow_the_model(base):
    run = settings(completion_length=1, block_length=1, steps=1, temperature=0.8)
    prompts = jnp.full((20_000, 2), 4)
    rollout = sample(TINY, base, None, prompts, None, jax.random.key(5), run)
    logits = jax.jit(denoise, static_argnums=0)(TINY, base, None, jnp.array([[4, 4, TINY.mask_token_id]]))
    logits = logits[0, -1, : TINY.mask_token_id]
    expected = 20_000 * np.asarray(jax.nn.softmax(logits / 0.8))
    counts = np.bincount(np.asarray(rollout.tokens[:, -1]), minlength=11)
    assert ((counts - expected) ** 2 / np.maximum(expected, 1)).sum() < 10 + 4.5 * np.sqrt(20)


def test_alg_temp_draws_positions_from_the_softmax():
    score = jnp.array([0.1, 0.5, -0.2, 0.9, 0.4])
    run = settings(strategy="entropy", completion_length=5, block_length=5, steps=4, alg_temp=0.5)
    eligible = jnp.ones((20_000, 5), bool).at[:, 4].set(False)
    scores = jnp.broadcast_to(score, eligible.shape)
    # floor(4 * 0.24975) is 0: double the eligible rows' share through a later step, where it is floor(4 * 0.333).
    first = select(run, eligible, scores, scores, jnp.asarray(1), keys_of(eligible))
    assert (first.sum(1) == 1).all()
    np.testing.assert_allclose(first.mean(0)[:4], jax.nn.softmax(score[:4] / 0.5), atol=0.015)


def test_a_schedule_counts_the_masks_of_each_row_alone():
    """Prompts whose tails share a block with the completion leave rows with fewer masks; neighbours do not count."""
    run = settings(strategy="entropy", completion_length=8, block_length=8, steps=3)
    eligible = jnp.arange(8) >= jnp.array([[0], [5]])
    scores = jnp.broadcast_to(jnp.arange(8.0), eligible.shape)
    chosen = select(run, eligible, scores, scores, jnp.asarray(1), keys_of(eligible))
    # floor(8 * 0.4995) and floor(3 * 0.4995).
    assert chosen.sum(axis=1).tolist() == [3, 1]


def test_one_program_for_all_keys_and_adapters(base):
    run = settings(temperature=1.0, steps=8)
    loras = [init_lora(TINY, jax.random.key(i), rank=2, alpha=4.0, targets=("q", "v")) for i in range(2)]
    strong = loras[1].replace(weights=jax.tree.map(lambda w: w + 1.0, loras[1].weights))
    before = sampler.compiled_sample._cache_size()
    rollouts = [
        sample(TINY, base, lora, PROMPTS, None, jax.random.key(seed), run)
        for lora, seed in ((loras[0], 0), (loras[1], 0), (loras[0], 1), (strong, 0))
    ]
    assert sampler.compiled_sample._cache_size() == before + 1
    first, same, other_key, other_policy = (np.asarray(r.tokens) for r in rollouts)
    np.testing.assert_array_equal(first, same)  # b = 0: the adapter is the identity
    assert (first != other_key).any() and (first != other_policy).any()


def test_sliced_head_proposes_the_same(base, monkeypatch):
    run = settings(temperature=1.0, cfg_scale=0.5, strategy="topk_margin")
    hidden = jax.random.normal(jax.random.key(0), (2, 3, 8, TINY.hidden_size))
    uniform = jax.random.uniform(jax.random.key(1), (3, 8, 2))
    whole = jax.jit(lambda: proposals.propose(TINY, base, hidden, uniform, run))()
    for limit in (2 * 3 * 2 * TINY.vocab_size, 1):
        monkeypatch.setattr(proposals, "MAX_LOGITS", limit)
        parts = jax.jit(lambda: proposals.propose(TINY, base, hidden, uniform, run))()
        for part, expected in zip(parts, whole, strict=True):
            np.testing.assert_allclose(part, expected, atol=1e-6)


@pytest.mark.parametrize("guided", [False, True])
def test_candidates_at_masked_positions_are_those_of_all(base, guided):
    """Other positions are not looked at, however many are left, and every position keeps its random number."""
    run = settings(temperature=0.8, cfg_scale=0.5 * guided)

    @jax.jit
    def both(hidden, uniform, eligible):
        rows = jnp.moveaxis(hidden, 0, 1).reshape(-1, *hidden.shape[2:])
        return (
            propose_at(TINY, base, lambda place: pick(rows, place), uniform, eligible, run),
            propose(TINY, base, hidden, uniform, run),
        )

    for masked in (0, 1, 2, 3, 5, 8):
        draws = np.random.default_rng(masked)
        hidden = draws.standard_normal((1 + guided, 2, 8, TINY.hidden_size)).astype(np.float32)
        uniform = draws.random((2, 8, 2)).astype(np.float32)
        eligible = np.zeros((2, 8), bool)
        eligible[0, draws.permutation(8)[:masked]] = True
        eligible[1, draws.permutation(8)[: masked // 2]] = True
        for one, other in zip(*both(hidden, uniform, eligible), strict=True):
            np.testing.assert_allclose(one[eligible], other[eligible], rtol=1e-5)


@pytest.mark.slow
def test_vanishing_guidance_is_none(base):
    rollouts = [
        sample(TINY, base, None, PROMPTS, None, jax.random.key(0), settings(cfg_scale=scale))
        for scale in (0.0, 1e-9, 3.0)
    ]
    np.testing.assert_array_equal(rollouts[0].tokens, rollouts[1].tokens)
    assert (rollouts[0].confidence != rollouts[2].confidence).any()


def test_origin_postpones_suppressed_confidence():
    """A postponed candidate waits until all that is left of its row are such, or for the last step."""
    run = settings(strategy="origin", completion_length=4, block_length=4, steps=4)
    rows = 4000
    eligible = jnp.ones((rows, 4), bool).at[:, 3].set(False)
    score = jnp.ones((rows, 4)).at[:, 1].set(remasking.LOWEST).at[rows // 2 :, :3].set(remasking.LOWEST)
    chosen = np.asarray(select(run, eligible, score, score, jnp.asarray(1), keys_of(eligible)))
    # The share of the second of four steps is a third.
    expected = [[1 / 3, 0, 1 / 3, 0], [1 / 3, 1 / 3, 1 / 3, 0]]
    np.testing.assert_allclose(chosen.reshape(2, -1, 4).mean(axis=1), expected, atol=0.03)
    assert not chosen[: rows // 2, 1].any()
    last = select(run, eligible, score, score, jnp.asarray(3), keys_of(eligible))
    np.testing.assert_array_equal(last, eligible)


def test_rows_that_only_fill_up_the_embedding_are_never_proposed(flat):
    filled = dataclasses.replace(TINY, known_tokens=4)
    run = settings(temperature=1.0, steps=8)
    rollout = sample(filled, flat, None, PROMPTS, None, jax.random.key(1), run)
    assert set(np.unique(rollout.tokens[:, 3:]).tolist()) == {0, 1, 2, 3}


def test_every_id_that_ends_a_completion_finishes_it():
    config = dataclasses.replace(TINY, end_token_ids=(5,))
    completion = jnp.array([[1, 5, 11], [11, 5, 1], [1, 0, 11], [1, 2, 3]])
    np.testing.assert_array_equal(finished(config, completion), [True, False, True, False])
    np.testing.assert_array_equal(finished(TINY, completion), [False, False, True, False])


def test_suppressed_tokens(flat):
    run = settings(temperature=1.0, suppress=(1, 2, 3, 4, 5), suppress_confidence=[6, 7, 8, 9], steps=8)
    tokens = jnp.ones((200, 1), jnp.int32)
    rollout = sample(TINY, flat, None, tokens, None, jax.random.key(0), run)
    completion = np.asarray(rollout.tokens[:, 1:])
    assert set(np.unique(completion)) == {0, 6, 7, 8, 9, 10}
    assert (commits(rollout, 8) == 1).all()
    np.testing.assert_allclose(rollout.confidence, 1 / 6, rtol=1e-5)
    # A third of the proposals is free to commit. The first commit of a block chooses among four positions, the last one
    # has no choice.
    free = np.isin(completion, (0, 10))
    first, last = (free[np.isin(rollout.commit_step, steps)].mean() for steps in ((0, 4), (3, 7)))
    assert abs(first - (1 - (2 / 3) ** 4)) < 0.1 and abs(last - 1 / 3) < 0.1


def test_postponed_candidates_come_last():
    lowest = remasking.LOWEST
    scores = jnp.array([[lowest, 0.1, 0.9, lowest], [lowest, lowest, lowest, 0.2]])
    eligible = jnp.array([[True, True, True, True], [True, True, False, False]])
    chosen = select(settings(steps=2), eligible, scores, scores, jnp.asarray(0), keys_of(eligible))
    np.testing.assert_array_equal(chosen, [[True, True, True, True], [True, True, False, False]])
    chosen = select(settings(steps=4), eligible, scores, scores, jnp.asarray(0), keys_of(eligible))
    np.testing.assert_array_equal(chosen, [[False, True, True, False], [True, True, False, False]])


@pytest.mark.parametrize("strategy", ["low_confidence", pytest.param("entropy", marks=pytest.mark.slow)])
def test_threshold(base, strategy):
    run = {
        threshold: sample(
            TINY, base, None, PROMPTS, None, jax.random.key(0), settings(strategy=strategy, threshold=threshold)
        )
        for threshold in (1e-9, 1.1)
    }
    np.testing.assert_array_equal(run[1e-9].commit_step, [[0] * 4 + [1] * 4] * 3)
    np.testing.assert_array_equal(np.sort(run[1.1].commit_step), [np.arange(8)] * 3)
    assert all((r.tokens != TINY.mask_token_id).all() for r in run.values())


def test_threshold_commits_what_is_sure_enough(checkpoints):
    config, base = checkpoints["llada"]
    prompts = np.arange(10, 28, dtype=np.int32).reshape(2, 9)
    run = settings(completion_length=16, block_length=8, threshold=0.3)
    rollout = sample(config, base, None, prompts, None, jax.random.key(0), run)
    for row in range(2):
        for block in range(2):
            steps, confidence = (
                np.asarray(x[row, 8 * block : 8 * block + 8]) for x in (rollout.commit_step, rollout.confidence)
            )
            for step in np.unique(steps):
                here = confidence[steps == step]
                assert here.size == 1 or (here >= 0.3).all()
    assert 2 < len(np.unique(rollout.commit_step)) < 16


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.5])
def test_factor(factor):
    confidence = np.asarray(jax.random.uniform(jax.random.key(0), (50, 8)) ** 0.3)
    eligible = np.asarray(jax.random.bernoulli(jax.random.key(1), 0.7, (50, 8)))
    chosen = select(
        settings(completion_length=8, block_length=8, factor=factor),
        jnp.asarray(eligible), jnp.asarray(confidence), jnp.asarray(confidence), jnp.asarray(0), keys_of(eligible),
    )  # fmt: skip
    for row in range(50):
        order = [i for i in np.argsort(-confidence[row]) if eligible[row, i]]
        passing = [n for n in range(1, len(order) + 1) if (n + 1) * (1 - confidence[row, order[n - 1]]) < factor]
        count = max(passing, default=min(1, len(order)))
        assert set(np.flatnonzero(chosen[row])) == set(order[:count])


def test_factor_fills_everything(base):
    rollout = sample(TINY, base, None, PROMPTS, None, jax.random.key(0), settings(factor=1.0))
    assert (rollout.tokens != TINY.mask_token_id).all()


def test_stops_when_every_row_has_ended(flat):
    run = settings(steps=8, stop_at_eos=True)
    rollout = sample(TINY, flat, None, PROMPTS, None, jax.random.key(0), run)
    np.testing.assert_array_equal(rollout.tokens[:, 3:], TINY.eos_token_id)
    np.testing.assert_array_equal(rollout.commit_step, [[0] + [8] * 7] * 3)
    np.testing.assert_array_equal(np.isfinite(rollout.confidence), [[True] + [False] * 7] * 3)
    assert (sampler.replay(rollout, TINY, 7)[:, 4:] == TINY.mask_token_id).all()


def test_does_not_stop_before_every_row_has_ended(flat):
    run = settings(steps=8, stop_at_eos=True, strategy="random", temperature=1.0, suppress=(1, 2, 3, 4, 5, 6, 7, 8))
    stopped = 0
    for seed in range(20):
        rollout = sample(TINY, flat, None, PROMPTS, None, jax.random.key(seed), run)
        completion, untouched = np.asarray(rollout.tokens[:, 3:]), np.asarray(rollout.commit_step) == 8
        assert (completion != TINY.mask_token_id).all() and (completion[untouched] == TINY.eos_token_id).all()
        committed_end = np.cumsum((completion == TINY.eos_token_id) & ~untouched, axis=1) > 0
        assert committed_end[untouched].all()
        stopped += untouched.any()
    assert 0 < stopped < 20


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"block_length": 3}, "block_length"),
        ({"block_length": 0}, "block_length"),
        ({"completion_length": 0}, "completion_length"),
        ({"steps": 0}, "steps"),
        ({"strategy": "greedy"}, "strategy"),
        ({"strategy": "low_confidenc"}, r"; did you mean low_confidence\?$"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"cfg_scale": -1.0}, "cfg_scale"),
        ({"alg_temp": -1.0}, "alg_temp"),
        ({"alg_temp": 0.1}, "alg_temp"),
        ({"eps": 0.0}, "eps"),
        ({"threshold": 0.9, "factor": 1.0}, "threshold"),
        ({"threshold": -0.5}, "threshold"),
        ({"factor": 0.0}, "factor"),
        ({"cache": "suffix"}, "cache"),
        ({"refresh_every": 4}, "refresh_every"),
        ({"cache": "dual", "refresh_every": 0}, "refresh_every"),
    ],
    ids=str,
)
def test_bad_settings_are_named(changes, named):
    with pytest.raises(UserError, match=named) as error:
        settings(**changes)
    assert "\n" not in str(error.value)


def test_bad_inputs_are_named(base):
    def run(prompts=PROMPTS, prompt_mask=None, **changes):
        return sample(TINY, base, None, prompts, prompt_mask, jax.random.key(0), settings(**changes))

    with pytest.raises(UserError, match="completion_length"):
        run(completion_length=64)
    with pytest.raises(UserError, match="prompt_mask"):
        run(prompt_mask=jnp.ones((3, 2), bool))
    with pytest.raises(UserError, match="suppress_confidence"):
        run(suppress_confidence=(12,))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"temperature": 1.0, "threshold": 0.3}, marks=pytest.mark.slow),
        pytest.param({"temperature": 0.0, "strategy": "random"}, marks=pytest.mark.slow),
        pytest.param({"temperature": 1.0, "strategy": "entropy", "alg_temp": 0.5}, marks=pytest.mark.slow),
    ],
)
def test_a_rollout_in_parts_draws_the_same_tokens(base, changes):
    """Every draw is the row's own, and so is the number of each step, also where other rows take more steps."""
    run, base = settings(**{"steps": 8} | changes), base | {"head": base["head"] / 15}
    prompts, numbers = jnp.arange(1, 13).reshape(4, 3) % 11, np.arange(4, dtype=np.int32)

    def sampled(rows):
        parts = np.split(numbers, 4 // rows)
        key = jax.random.key(3)
        found = [sample(TINY, base, None, prompts[part], None, key, run, part) for part in parts]
        return np.concatenate([np.concatenate([part.tokens, part.commit_step], axis=1) for part in found])

    whole = sampled(4)
    assert len(np.unique(whole[:, 3 : prompts.shape[1] + run.completion_length], axis=0)) > 2
    for rows in (2, 1):
        np.testing.assert_array_equal(sampled(rows), whole)
