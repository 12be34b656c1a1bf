"""Iterative unmasking: completions from a masked denoiser, the whole loop one compiled program.

Letters: B rows, P prompt tokens, L completion tokens, T = P + L, S positions that a step looks at (the active block, or
the whole completion), D hidden size, V vocabulary. A step proposes one candidate token per masked position, scores the
candidates, and commits the best of them; `Strategy` names how each of the three is done.

Sources: the public samplers of the two families of masked language models (low-confidence remasking in blocks with a
fixed number of tokens per step; a time schedule with a confidence ordering), Fast-dLLM (arXiv:2505.22618) for
`threshold` and `factor`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Int

from gdsd_jax.denoiser import DenoiserConfig, LoRA, Read, hidden_states_at, pick, repeated
from gdsd_jax.diffusion.cache import cached_states_at, refresh, region
from gdsd_jax.diffusion.proposals import propose_at
from gdsd_jax.diffusion.remasking import LOWEST, STRATEGIES, SamplerConfig, select
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.sharding import constrain


class Rollout(NamedTuple):
    """Completions and how they came about.

    tokens: [B, P+L] int32, prompt and completion.
    commit_step: [B, L] int32, the last step that wrote the position, counted from 0 over all blocks;
        `SamplerConfig.step_limit` (that is, `steps`) if none did.
    confidence: [B, L] float32, the committed token's softmax probability at that step, under the logits without noise,
        temperature, top_p and top_k (but after guidance, `suppress` and `forbid_mask`); -inf if no step wrote it.
    log_prob: [B, L] float32 or None, the committed token's log-probability at its draw, that is, after temperature,
        top_p and top_k; 0 if no step wrote it.
    entropy: [B, L] float32 or None, of the distribution of which `confidence` is a probability, in nats; 0 if no step
        wrote it. Both are None without `SamplerConfig.record`.
    """

    tokens: Array
    commit_step: Array
    confidence: Array
    log_prob: Array | None = None
    entropy: Array | None = None


class _State(NamedTuple):
    tokens: Array  # [B, T]
    commit_step: Array  # [B, L]
    confidence: Array  # [B, L]
    recorded: tuple[Array, ...]  # log_prob and entropy [B, L], or nothing
    step: Array  # steps taken
    block: Array
    step_in_block: Array


def sample(
    config: DenoiserConfig,
    base: dict,
    lora: LoRA | None,
    prompts: Int[Array | np.ndarray, "B P"],
    prompt_mask: Array | np.ndarray | None,
    key: Array,
    settings: SamplerConfig,
    numbers: Int[Array | np.ndarray, " B"] | None = None,
) -> Rollout:
    """Completions of `prompts` [B, P] int32, left-padded; `prompt_mask` [B, P] True on real tokens, None: all are real.

    Pure; compiled once per shape, config and settings. Every draw is a function of `key`, of the row's number, of the
    block and of the step in it: neither left padding nor the rows beside a row change one. `numbers` [B] int32 says
    which rows these are of a rollout that is sampled in parts; None: the first B.

    Raises UserError when the sequence or a token id does not fit the model, or the mask does not fit the prompts.
    """
    if prompt_mask is not None and prompt_mask.shape != prompts.shape:
        raise UserError(f"prompt_mask has shape {prompt_mask.shape}, prompts {prompts.shape}; they must agree")
    check_fits(config, prompts.shape[1], settings)
    return compiled_sample(config, base, lora, prompts, prompt_mask, key, settings, numbers)


def check_fits(config: DenoiserConfig, prompt_length: int, settings: SamplerConfig) -> None:
    """Raises UserError where prompt and completion, or a token id of the settings, do not fit the model."""
    length = prompt_length + settings.completion_length
    if length > config.max_length:
        raise UserError(
            f"prompt ({prompt_length}) and completion_length ({settings.completion_length}) make {length} tokens, "
            f"the model holds {config.max_length}; shorten completion_length or the prompts"
        )
    if settings.cache != "none" and config.next_token_logits and prompt_length == 0:
        raise UserError("a cache needs a prompt where logits speak of the next token; give one, or set cache='none'")
    for name in ("suppress", "suppress_confidence"):
        if any(not 0 <= token < config.vocab_size for token in getattr(settings, name)):
            raise UserError(f"{name} {getattr(settings, name)} has ids outside the vocabulary of {config.vocab_size}")


def replay(rollout: Rollout, config: DenoiserConfig, step: int) -> Int[Array, "B T"]:
    """The tokens [B, P+L] as they were after `step` (-1: the fully masked start).

    Exact although only the last write of a position is known: a position is written again only while it holds a mask.
    What `stop_at_eos` filled in stays masked until `SamplerConfig.step_limit`.
    """
    prompt_length = rollout.tokens.shape[1] - rollout.commit_step.shape[1]
    later = jnp.pad(rollout.commit_step > step, ((0, 0), (prompt_length, 0)))
    return jnp.where(later, config.mask_token_id, rollout.tokens)


def _finished(config: DenoiserConfig, completion: Array) -> Array:
    """[B]: an id that ends a completion is committed and nothing before it is masked."""
    masked_before = jnp.cumsum(completion == config.mask_token_id, axis=1)
    ends = functools.reduce(jnp.logical_or, [completion == token for token in config.ends])
    return jnp.any(ends & (masked_before == 0), axis=1)


def passes(
    config: DenoiserConfig, settings: SamplerConfig, tokens: Array, prompt_mask: Array | None
) -> tuple[Array, Array | None]:
    """The rows that the denoiser sees, [B, T] or, with guidance, [2B, T]: the two passes of a row stand together."""
    if settings.cfg_scale == 0:
        return tokens, prompt_mask
    in_prompt = jnp.arange(tokens.shape[1]) < tokens.shape[1] - settings.completion_length
    both = jnp.stack([tokens, jnp.where(in_prompt, config.mask_token_id, tokens)], axis=1)
    mask = None if prompt_mask is None else jnp.repeat(prompt_mask, 2, axis=0)
    return both.reshape(-1, tokens.shape[1]), mask


def _commit(
    config: DenoiserConfig, base: dict, keys: Array, settings: SamplerConfig, state: _State, read: Read
) -> _State:
    """One step; `keys` [B] are the rows' own, `read` gives hidden states at places of its region."""
    prompt_length = state.tokens.shape[1] - settings.completion_length
    block_end = (state.block + 1) * settings.block_length
    start, size = region(settings, state.block)
    # Not by the count of all steps, which with a threshold hangs on the slowest row of each block.
    of_step = lambda key: jax.random.fold_in(jax.random.fold_in(key, state.block), state.step_in_block)  # noqa: E731
    step_keys = jax.vmap(lambda key: jax.random.split(of_step(key), 3))(keys)
    uniforms = lambda number, *shape: jax.vmap(lambda key: jax.random.uniform(key, shape))(step_keys[:, number])  # noqa: E731

    old = lax.dynamic_slice_in_dim(state.tokens, prompt_length + start, size, axis=1)
    eligible = (old == config.mask_token_id) & (start + jnp.arange(size) < block_end)

    with jax.named_scope("propose"):
        uniform = uniforms(0, size, 2)
        token, confidence, score, *recorded = propose_at(config, base, read, uniform, eligible, settings)

    with jax.named_scope("commit"):
        if STRATEGIES[settings.strategy].uniform:
            score = uniforms(1, size)
        postponed = jnp.isin(token, jnp.asarray(settings.suppress_confidence, jnp.int32))
        commit = select(
            settings,
            eligible,
            jnp.where(postponed, LOWEST, confidence),
            jnp.where(postponed, LOWEST, score),
            state.step_in_block,
            step_keys[:, 2],
        )

        def write(array: Array, new: Array, offset: int = 0) -> Array:
            current = lax.dynamic_slice_in_dim(array, offset + start, size, axis=1)
            return lax.dynamic_update_slice_in_dim(array, jnp.where(commit, new, current), offset + start, axis=1)

        tokens = write(state.tokens, token, prompt_length)
        done = state.step_in_block == settings.steps_per_block - 1
        if settings.threshold is not None or settings.factor is not None:
            masked = tokens[:, prompt_length:] == config.mask_token_id
            done |= ~jnp.any(masked & (jnp.arange(settings.completion_length) < block_end))
        return _State(
            tokens,
            write(state.commit_step, state.step),
            write(state.confidence, confidence),
            tuple(map(write, state.recorded, recorded)),
            state.step + 1,
            state.block + done,
            jnp.where(done, 0, state.step_in_block + 1),
        )


@functools.partial(jax.jit, static_argnames=("config", "settings"))
def compiled_sample(
    config: DenoiserConfig,
    base: dict,
    lora: LoRA | None,
    prompts: Int[Array | np.ndarray, "B P"],
    prompt_mask: Array | np.ndarray | None,
    key: Array,
    settings: SamplerConfig,
    numbers: Int[Array | np.ndarray, " B"] | None = None,
) -> Rollout:
    """`sample` without its checks: the jitted program itself."""
    rows, prompt_length = prompts.shape
    prompts = constrain(prompts, ("rows", "tokens"))
    prompt_mask = None if prompt_mask is None else prompt_mask.astype(bool)
    shape = (rows, settings.completion_length)
    zero = jnp.zeros((), jnp.int32)
    start = _State(
        jnp.concatenate([prompts.astype(jnp.int32), jnp.full(shape, config.mask_token_id, jnp.int32)], axis=1),
        jnp.full(shape, settings.step_limit, jnp.int32),
        jnp.full(shape, -jnp.inf, jnp.float32),
        (jnp.zeros(shape),) * (2 if settings.record else 0),
        zero,
        zero,
        zero,
    )

    def unfinished(state: _State) -> Array:
        more = state.block < settings.blocks
        if settings.stop_at_eos:
            more &= ~jnp.all(_finished(config, state.tokens[:, prompt_length:]))
        return more

    # A step passes a block at least.
    base, lora = repeated(config, base, lora, tokens=settings.step_limit * rows * settings.block_length)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows) if numbers is None else numbers)
    commit = functools.partial(_commit, config, base, keys, settings)

    def exact_step(state: _State) -> _State:
        with jax.named_scope("denoise"):
            inputs, mask = passes(config, settings, state.tokens, prompt_mask)
            read = hidden_states_at(config, base, lora, inputs, prompt_mask=mask)
            first, _ = region(settings, state.block)
        return commit(state, lambda place: read(prompt_length + first + place))

    def refreshed_steps(state: _State) -> _State:
        """A full step, and the cached ones up to the next. The cache is a constant of their loop, never copied."""
        with jax.named_scope("refresh"):
            inputs, mask = passes(config, settings, state.tokens, prompt_mask)
            hidden, cache = refresh(config, base, lora, inputs, mask, state.block, settings)

        def cached_step(state: _State) -> _State:
            with jax.named_scope("denoise"):
                inputs, _ = passes(config, settings, state.tokens, prompt_mask)
                read = cached_states_at(config, base, lora, hidden, cache, inputs, mask, state.block, settings)
            return commit(state, read)

        def fresh_enough(state: _State) -> Array:
            return unfinished(state) & (state.step_in_block % (settings.refresh_every or settings.steps_per_block) > 0)

        return lax.while_loop(fresh_enough, cached_step, commit(state, functools.partial(pick, hidden)))

    step = exact_step if settings.cache == "none" else refreshed_steps
    tokens, commit_step, confidence, recorded, *_ = lax.while_loop(unfinished, step, start)
    if settings.stop_at_eos:
        completion = tokens[:, prompt_length:]
        fill = (completion == config.mask_token_id) & _finished(config, completion)[:, None]
        tokens = tokens.at[:, prompt_length:].set(jnp.where(fill, config.eos_token_id, completion))
    arrays = (tokens, commit_step, confidence, *recorded)
    return Rollout(*(constrain(array, ("rows", "tokens")) for array in arrays))
