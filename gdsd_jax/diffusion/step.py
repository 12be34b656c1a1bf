"""Takes one step of unmasking: draws and scores candidates at masked positions, and commits the best of them.

The letters of shapes are those of `sampler`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from gdsd_jax.denoiser import DenoiserConfig, Read
from gdsd_jax.diffusion.cache import region
from gdsd_jax.diffusion.proposals import Boost, propose_at
from gdsd_jax.diffusion.remasking import LOWEST, STRATEGIES, SamplerConfig, commit_plan, select


class Rollout(NamedTuple):
    """Completions, and a record of the steps that wrote them.

    tokens: [B, P+L] int32, prompt and completion.
    commit_step: [B, L] int32, the last step that wrote the position, counted from 0 over all blocks. If no step did, it
        is `blocks.step_limit`, which is the number of steps unless blocks may take more. Where rows need different
        numbers of steps for a block, those at which a row waits for others are not counted: rows do not depend on each
        other.
    confidence: [B, L] float32, the committed token's softmax probability at that step, under the logits without noise,
        temperature, top_p and top_k (but after guidance, `suppress` and `forbid_mask`); -inf if no step wrote it.
    log_prob: [B, L] float32, the log-probability in nats with which the committed token was drawn, after temperature,
        top_p and top_k; 0 if no step wrote it. None without `SamplerConfig.record`.
    entropy: [B, L] float32, the entropy in nats of the distribution from which `confidence` is read; 0 if no step wrote
        it. None without `SamplerConfig.record`.
    """

    tokens: Array
    commit_step: Array
    confidence: Array
    log_prob: Array | None = None
    entropy: Array | None = None


class State(NamedTuple):
    """The state of a rollout between two steps."""

    tokens: Array  # [B, T]
    commit_step: Array  # [B, L]
    confidence: Array  # [B, L]
    recorded: tuple[Array, ...]  # log_prob and entropy [B, L], or nothing
    started: Array  # [B], the number of masked tokens at the start of the block
    waited: Array  # [B], the number of steps at which the row only waited for others
    step: Array  # scalar, the number of steps taken
    block: Array  # scalar
    step_in_block: Array  # scalar


def ends(config: DenoiserConfig, tokens: Array) -> Array:
    """Returns where `tokens` hold an id that ends a completion."""
    return functools.reduce(jnp.logical_or, [tokens == token for token in config.ends])


def finished(config: DenoiserConfig, completion: Array) -> Array:
    """Returns for each row, [B], whether it holds an id that ends a completion and nothing before it is masked."""
    masked_before = jnp.cumsum(completion == config.mask_token_id, axis=1)
    return jnp.any(ends(config, completion) & (masked_before == 0), axis=1)


def passes(
    config: DenoiserConfig, settings: SamplerConfig, tokens: Array, prompt_mask: Array | None
) -> tuple[Array, Array | None]:
    """Returns the rows that the denoiser runs, and their prompt mask.

    The rows are [B, T] or, with guidance, [2B, T], where the two passes of a row are adjacent.
    """
    if settings.cfg_scale == 0:
        return tokens, prompt_mask
    in_prompt = jnp.arange(tokens.shape[1]) < tokens.shape[1] - settings.completion_length
    both = jnp.stack([tokens, jnp.where(in_prompt, config.mask_token_id, tokens)], axis=1)
    mask = None if prompt_mask is None else jnp.repeat(prompt_mask, 2, axis=0)
    return both.reshape(-1, tokens.shape[1]), mask


def beginning(config: DenoiserConfig, settings: SamplerConfig, tokens: Array, limit: int) -> State:
    """Returns the state before the first step on `tokens` [B, T], whose last L are the completion.

    Args:
      limit: the `commit_step` of masked positions. Tokens of the completion that are given have the `commit_step` -1.
    """
    shape = (len(tokens), settings.completion_length)
    masked = tokens[:, tokens.shape[1] - shape[1] :] == config.mask_token_id
    zero = jnp.zeros((), jnp.int32)
    return State(
        tokens,
        jnp.where(masked, limit, -1).astype(jnp.int32),
        jnp.full(shape, -jnp.inf, jnp.float32),
        (jnp.zeros(shape),) * (2 if settings.record else 0),
        jnp.zeros(len(tokens), jnp.int32),
        jnp.zeros(len(tokens), jnp.int32),
        zero,
        zero,
        zero,
    )


def row_keys(key: Array, rows: int, numbers: Array | None) -> Array:
    """Returns a key for each row, [B], from the rows' `numbers` [B] in a rollout (None: 0 to B - 1)."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows) if numbers is None else numbers)


def end_think_boost(settings: SamplerConfig, completion: Array, start: Array, eligible: Array) -> Boost:
    """Returns the logit of each row that `SamplerConfig.end_think` raises, in the region that begins at `start`.

    It is the logit of the id that continues the sequence, at the first `eligible` position [B, S]. If the completion
    [B, L] holds the sequence already, 0 is added. Source: iLLaDA's sampler of growing texts.
    """
    sequence, length = jnp.asarray(settings.end_think, jnp.int32), completion.shape[1]
    windows = jnp.arange(max(0, length - sequence.size + 1))[:, None] + jnp.arange(sequence.size)
    written = jnp.any(jnp.all(completion[:, windows] == sequence, axis=-1), axis=-1)
    place = jnp.argmax(eligible, axis=1)
    at = start + place
    begun = jnp.zeros_like(at)
    for count in range(1, sequence.size):
        before = at[:, None] - count + jnp.arange(count)
        same = jnp.take_along_axis(completion, jnp.maximum(before, 0), axis=1) == sequence[:count]
        begun = jnp.where((at >= count) & jnp.all(same, axis=1), count, begun)
    amount = settings.end_think_boost * ((at + 1) / length) ** settings.end_think_power
    return Boost(place, sequence[begun], jnp.where(written | ~jnp.any(eligible, axis=1), 0.0, amount))


def commit(
    config: DenoiserConfig,
    base: dict,
    keys: Array,
    settings: SamplerConfig,
    state: State,
    read: Read,
    span: tuple[Array, int] | None = None,
) -> State:
    """Takes one step.

    Args:
      keys: [B], those of `row_keys`.
      read: a function from positions of the step's region to hidden states.
      span: start and size of the region in the completion; the block is then finished once nothing in it is masked.
        None: the region is that of `cache.region`.
    """
    prompt_length = state.tokens.shape[1] - settings.completion_length
    block_end = (state.block + 1) * settings.block_length
    start, size = region(settings, state.block) if span is None else span
    # With a threshold, the number of all steps depends on the slowest row of each block; keys must not depend on it.
    of_step = lambda key: jax.random.fold_in(jax.random.fold_in(key, state.block), state.step_in_block)  # noqa: E731
    step_keys = jax.vmap(lambda key: jax.random.split(of_step(key), 3))(keys)

    def uniforms(number: int, *shape: int) -> Array:
        """Draws uniform numbers [B, *shape] with one of the three keys of each row."""
        return jax.vmap(lambda key: jax.random.uniform(key, shape))(step_keys[:, number])

    old = lax.dynamic_slice_in_dim(state.tokens, prompt_length + start, size, axis=1)
    position = start + jnp.arange(size)
    eligible = (old == config.mask_token_id) & (position < block_end)
    in_block = jnp.sum(eligible & (position >= state.block * settings.block_length), axis=1)
    started = jnp.where(state.step_in_block == 0, in_block, state.started)

    with jax.named_scope("propose"):
        uniform = uniforms(0, size, 2)
        boost = None
        if settings.end_think:
            boost = end_think_boost(settings, state.tokens[:, prompt_length:], start, eligible)
        token, confidence, score, *recorded = propose_at(config, base, read, uniform, eligible, settings, boost)

    with jax.named_scope("commit"):
        strategy = STRATEGIES[settings.strategy]
        if strategy.uniform:
            score = uniforms(1, size)
        if strategy.leftmost:
            score = jnp.broadcast_to(-position.astype(jnp.float32), score.shape)
        postponed = jnp.isin(token, jnp.asarray(settings.suppress_confidence, jnp.int32))
        commit = select(
            settings,
            eligible,
            jnp.where(postponed, LOWEST, confidence),
            jnp.where(postponed, LOWEST, score),
            state.step_in_block,
            step_keys[:, 2],
            started,
        )

        def write(array: Array, new: Array, offset: int = 0) -> Array:
            current = lax.dynamic_slice_in_dim(array, offset + start, size, axis=1)
            return lax.dynamic_update_slice_in_dim(array, jnp.where(commit, new, current), offset + start, axis=1)

        tokens = write(state.tokens, token, prompt_length)
        done = state.step_in_block == settings.steps_per_block - 1
        scheduled = settings.threshold is None and settings.factor is None
        waits = jnp.zeros(len(tokens), bool)
        if span is not None or not scheduled:
            waits = (state.step_in_block > 0) & ~jnp.any(eligible, axis=1)
        if scheduled and strategy.plan is not None:
            lengths = jnp.asarray((commit_plan(settings) > 0).sum(axis=1))
            done = state.step_in_block + 1 >= jnp.max(lengths[started])
        if span is not None:
            left = lax.dynamic_slice_in_dim(tokens, prompt_length + start, size, axis=1) == config.mask_token_id
            done |= ~jnp.any(left)
        elif not scheduled:
            masked = tokens[:, prompt_length:] == config.mask_token_id
            done |= ~jnp.any(masked & (jnp.arange(settings.completion_length) < block_end))
        return State(
            tokens,
            write(state.commit_step, (state.step - state.waited)[:, None]),
            write(state.confidence, confidence),
            tuple(map(write, state.recorded, recorded)),
            started,
            state.waited + waits,
            state.step + 1,
            state.block + done,
            jnp.where(done, 0, state.step_in_block + 1),
        )
