"""Iterative unmasking: completions from a masked denoiser, the whole loop one compiled program.

Letters: B rows, P prompt tokens, L completion tokens, T = P + L, S positions that a step looks at (the active block, or
the whole completion), D hidden size, V vocabulary. A step proposes one candidate token per masked position, scores the
candidates, and commits the best of them; `Strategy` names how each of the three is done.

Sources: the public samplers of the two families of masked language models (low-confidence remasking in blocks with a
fixed number of tokens per step; a time schedule with a confidence ordering), Fast-dLLM (arXiv:2505.22618) for
`threshold` and `factor`.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from gdsd_jax.denoiser import DenoiserConfig, LoRA, hidden_states, logits_from_hidden
from gdsd_jax.errors import UserError

# Logits of at most this many elements (1 GiB in float32) exist at once; a larger region is read in slices of positions.
MAX_LOGITS = 2**28
GROUP = 128  # tokens per group of the two-level draw
_LOWEST = jnp.finfo(jnp.float32).min


class Strategy(NamedTuple):
    """How a strategy schedules, scores and selects.

    timed: commits per step follow the time schedule linspace(1, eps); otherwise they are split evenly over the steps.
    score: (proposal probabilities [..., V], candidate's probability there [...]) -> [...], or None: not read from them.
    uniform: the order of the commits is uniform noise.
    independent: every masked position is committed by a coin of its own (implies timed).
    """

    timed: bool
    score: Callable | None = None
    uniform: bool = False
    independent: bool = False


def _margin(probs: Array, _: Array) -> Array:
    best = jnp.argmax(probs, axis=-1, keepdims=True)
    others = jnp.where(jnp.arange(probs.shape[-1]) == best, -jnp.inf, probs)
    return jnp.max(probs, axis=-1) - jnp.max(others, axis=-1)


STRATEGIES = {
    "low_confidence": Strategy(timed=False),
    "random": Strategy(timed=False, uniform=True),
    "maskgit_plus": Strategy(timed=True, score=lambda probs, candidate: candidate),
    "topk_margin": Strategy(timed=True, score=_margin),
    "entropy": Strategy(timed=True, score=lambda probs, _: jnp.sum(probs * jnp.log(probs + 1e-10), axis=-1)),
    "origin": Strategy(timed=True, uniform=True, independent=True),
}


@dataclass(frozen=True)
class SamplerConfig:
    """Settings of `sample`; hashable, so each distinct value compiles its own program.

    completion_length: L, tokens to generate.
    steps: denoising steps of the whole completion; each of the blocks gets max(1, steps // blocks).
    block_length: blocks are finished left to right; L means no blocks.
    strategy: schedule, proposal noise and ordering together.
        low_confidence, random: tokens per step split evenly over the block's steps; ordered by the candidate's
            probability under the plain logits, or by uniform noise.
        maskgit_plus, topk_margin, entropy, origin: time schedule linspace(1, eps, steps + 1) inside each block, a step
            from t to s committing floor(n (1 - s/t)) of the n masked tokens, the last one all; ordered by the
            candidate's probability, by the margin of the two best tokens, or by negative entropy, all after
            temperature, top_p and top_k; origin commits every masked token with probability 1 - s/t.
    temperature: of the proposal; 0 takes the argmax.
    top_p, top_k: cut the proposal, of every strategy, top_p first; tokens that tie at the cut stay.
    cfg_scale: s in un + (s + 1)(cond - un), where the unconditional pass sees a masked prompt; 0 skips that pass.
    alg_temp: draws the positions from softmax(confidence / alg_temp) instead of taking the best; 0 takes the best.
    eps: last time of the time schedule.
    threshold: instead of a schedule, commit every candidate of at least this probability (plain logits), always the
        strategy's first.
    factor: instead of a schedule, commit the n most probable candidates, n the largest with
        (n + 1)(1 - c_n) < factor, c_n the n-th highest probability (plain logits), always the strategy's first.
        Both take as many steps as they need, at most block_length a block, whatever `steps` says.
    cache, refresh_every: only "none" and None; this version computes keys and values anew at every step.
    stop_at_eos: stop once every row has committed an EOS with nothing masked before it; what is masked then becomes
        EOS.
    suppress: token ids that are never proposed.
    suppress_confidence: token ids that are committed only when nothing else is left to commit.
    forbid_mask: never propose the mask token. False reproduces the public samplers, which may: such a position counts
        as committed, stays masked, and may be written again later.

    Raises UserError on settings that are out of range or contradict each other.
    """

    completion_length: int
    steps: int
    block_length: int
    strategy: str
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    cfg_scale: float = 0.0
    alg_temp: float = 0.0
    eps: float = 1e-3
    threshold: float | None = None
    factor: float | None = None
    cache: str = "none"
    refresh_every: int | None = None
    stop_at_eos: bool = False
    suppress: Sequence[int] = ()
    suppress_confidence: Sequence[int] = ()
    forbid_mask: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "suppress", tuple(self.suppress))
        object.__setattr__(self, "suppress_confidence", tuple(self.suppress_confidence))
        for wrong, message in (
            (self.completion_length < 1, f"completion_length is {self.completion_length}; it must be at least 1"),
            (self.block_length < 1, f"block_length is {self.block_length}; it must be at least 1"),
            (self.steps < 1, f"steps is {self.steps}; it must be at least 1"),
            (
                self.block_length >= 1 and self.completion_length % self.block_length,
                f"completion_length {self.completion_length} is not a multiple of block_length {self.block_length}; "
                "change one of them",
            ),
            (
                self.strategy not in STRATEGIES,
                f"strategy {self.strategy!r} is unknown; choose one of {', '.join(STRATEGIES)}",
            ),
            (not self.temperature >= 0, f"temperature is {self.temperature}; it must be 0 or more"),
            (
                self.top_p is not None and not 0 < self.top_p <= 1,
                f"top_p is {self.top_p}; it must be above 0 and at most 1, or None",
            ),
            (self.top_k is not None and self.top_k < 1, f"top_k is {self.top_k}; it must be at least 1, or None"),
            (not self.cfg_scale >= 0, f"cfg_scale is {self.cfg_scale}; it must be 0 (off) or more"),
            (not self.alg_temp >= 0, f"alg_temp is {self.alg_temp}; it must be 0 or more"),
            (
                self.alg_temp and self.strategy in STRATEGIES and STRATEGIES[self.strategy].score is None,
                f"alg_temp has no meaning for strategy {self.strategy!r}; set alg_temp=0",
            ),
            (not 0 < self.eps < 1, f"eps is {self.eps}; it must lie between 0 and 1"),
            (
                self.threshold is not None and self.factor is not None,
                "threshold and factor are both given; set one of them to None",
            ),
            (
                self.threshold is not None and not self.threshold >= 0,
                f"threshold is {self.threshold}; it must be 0 or more, or None",
            ),
            (self.factor is not None and not self.factor > 0, f"factor is {self.factor}; it must be above 0, or None"),
            (self.cache != "none", f"cache is {self.cache!r}, but this version has no KV cache; set cache='none'"),
            (
                self.refresh_every is not None,
                "refresh_every needs a KV cache; this version has none, set it to None",
            ),
        ):
            if wrong:
                raise UserError(message)

    @property
    def blocks(self) -> int:
        return self.completion_length // self.block_length

    @property
    def steps_per_block(self) -> int:
        """Steps that one block may take: the schedule's, or with threshold or factor one per token."""
        scheduled = self.threshold is None and self.factor is None
        return max(1, self.steps // self.blocks) if scheduled else self.block_length

    @property
    def step_limit(self) -> int:
        """`commit_step` of a position that no step wrote: `steps`, or more where the blocks may take more steps."""
        return max(self.steps, self.blocks * self.steps_per_block)


class Rollout(NamedTuple):
    """Completions and how they came about.

    tokens: [B, P+L] int32, prompt and completion.
    commit_step: [B, L] int32, the last step that wrote the position, counted from 0 over all blocks;
        `SamplerConfig.step_limit` (that is, `steps`) if none did.
    confidence: [B, L] float32, the committed token's softmax probability at that step, under the logits without noise,
        temperature, top_p and top_k (but after guidance, `suppress` and `forbid_mask`); -inf if no step wrote it.
    """

    tokens: Array
    commit_step: Array
    confidence: Array


class _State(NamedTuple):
    tokens: Array  # [B, T]
    commit_step: Array  # [B, L]
    confidence: Array  # [B, L]
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
) -> Rollout:
    """Completions of `prompts` [B, P] int32, left-padded; `prompt_mask` [B, P] True on real tokens, None: all are real.

    Pure; compiled once per shape, config and settings. `key` is the only source of randomness; at the same shape of
    the completions, left padding changes no draw.

    Raises UserError when the sequence or a token id does not fit the model, or the mask does not fit the prompts.
    """
    if prompt_mask is not None and prompt_mask.shape != prompts.shape:
        raise UserError(f"prompt_mask has shape {prompt_mask.shape}, prompts {prompts.shape}; they must agree")
    check_fits(config, prompts.shape[1], settings)
    return compiled_sample(config, base, lora, prompts, prompt_mask, key, settings)


def check_fits(config: DenoiserConfig, prompt_length: int, settings: SamplerConfig) -> None:
    """Raises UserError where prompt and completion, or a token id of the settings, do not fit the model."""
    length = prompt_length + settings.completion_length
    if length > config.max_length:
        raise UserError(
            f"prompt ({prompt_length}) and completion_length ({settings.completion_length}) make {length} tokens, "
            f"the model holds {config.max_length}; shorten completion_length or the prompts"
        )
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


def _keep_top_p(logits: Array, top_p: float) -> Array:
    """Cuts to the most probable tokens, up to and including the first one that takes their mass beyond top_p.

    A token stays when the mass strictly above it is at most top_p. Non-negative floats order like their bits, so
    bisecting the integers finds the cut exactly in 31 passes, a fraction of what sorting a large vocabulary costs.
    """
    probs = jax.nn.softmax(logits)
    bits = lax.bitcast_convert_type(probs, jnp.int32)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        too_low, enough = bounds
        middle = too_low + (enough - too_low) // 2
        fits = jnp.sum(jnp.where(bits > middle[..., None], probs, 0), axis=-1) <= top_p
        return jnp.where(fits, too_low, middle), jnp.where(fits, middle, enough)

    highest = jnp.max(bits, axis=-1)
    _, cut = lax.fori_loop(0, 31, halve, (jnp.full_like(highest, -1), highest))
    return jnp.where(bits >= cut[..., None], logits, -jnp.inf)


def _keep_top_k(logits: Array, top_k: int) -> Array:
    cut = lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits >= cut, logits, -jnp.inf)


def _take(values: Array, index: Array) -> Array:
    return jnp.take_along_axis(values, index[..., None], axis=-1)[..., 0]


def _invert(weights: Array, target: Array) -> Array:
    """First index [...] at which the cumulative sum of `weights` [..., N] exceeds `target` [...].

    A parallel cumulative sum need not be monotone to the last bit, nor exceed a target next to the total: hence only
    positive weights can be hit, and the largest one is taken when rounding leaves none.
    """
    hit = (jnp.cumsum(weights, axis=-1) > target[..., None]) & (weights > 0)
    return jnp.where(jnp.any(hit, axis=-1), jnp.argmax(hit, axis=-1), jnp.argmax(weights, axis=-1))


def draw(probs: Float[Array, "*S V"], uniform: Float[Array, "*S"]) -> Int[Array, "*S"]:
    """One token per distribution, which need not be normalised, by inverting its cumulative sum at a number in [0, 1).

    The same distribution as the argmax of logits plus Gumbel noise, at one random number instead of V. The sum is
    inverted in two levels, groups of tokens and then the tokens of one group: one pass over the vocabulary instead of
    log V. Never draws a token of probability zero.
    """
    padded = jnp.pad(probs, [(0, 0)] * (probs.ndim - 1) + [(0, -probs.shape[-1] % GROUP)])
    groups = padded.reshape(*probs.shape[:-1], -1, GROUP)
    mass = jnp.sum(groups, axis=-1)
    total = jnp.cumsum(mass, axis=-1)
    target = uniform * total[..., -1]
    group = _invert(mass, target)
    within = jnp.take_along_axis(groups, group[..., None, None], axis=-2)[..., 0, :]
    token = _invert(within, target - (_take(total, group) - _take(mass, group)))
    return (group * GROUP + token).astype(jnp.int32)


def _candidates(logits: Array, uniform: Array, settings: SamplerConfig) -> tuple[Array, Array, Array]:
    """logits [..., V], uniform [...] -> candidate tokens, their probability under `logits`, the strategy's score."""
    strategy = STRATEGIES[settings.strategy]
    cut = logits / settings.temperature if settings.temperature > 0 else logits
    if settings.top_p is not None and settings.top_p < 1:
        cut = _keep_top_p(cut, settings.top_p)
    if settings.top_k is not None:
        cut = _keep_top_k(cut, settings.top_k)
    probs = jax.nn.softmax(cut)
    # Not the argmax of `probs`: rounding can make the two best equal there.
    token = draw(probs, uniform) if settings.temperature > 0 else jnp.argmax(cut, axis=-1).astype(jnp.int32)
    confidence = jnp.exp(_take(logits, token) - jax.nn.logsumexp(logits, axis=-1))
    score = strategy.score(probs, _take(probs, token)) if strategy.score else confidence
    return token, confidence, score


def _propose(
    config: DenoiserConfig, base: dict, hidden: Array, uniform: Array, settings: SamplerConfig
) -> tuple[Array, Array, Array]:
    """hidden [1 or 2, B, S, D] (conditional, unconditional), uniform [B, S] -> as `_candidates`, [B, S]."""
    banned = np.zeros(config.vocab_size, bool)
    banned[list(settings.suppress) + [config.mask_token_id] * settings.forbid_mask] = True

    def propose(slices: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        hidden, uniform = slices
        logits = logits_from_hidden(config, base, hidden)
        if logits.shape[0] == 2:
            logits = logits[1:] + (settings.cfg_scale + 1) * (logits[:1] - logits[1:])
        return _candidates(jnp.where(banned, -jnp.inf, logits[0]), uniform, settings)

    passes, rows, positions, width = hidden.shape
    slices = next(
        n for n in range(1, positions + 1)
        if positions % n == 0 and (passes * rows * (positions // n) * config.vocab_size <= MAX_LOGITS or n == positions)
    )  # fmt: skip
    if slices == 1:
        return propose((hidden, uniform))
    size = positions // slices
    parts = lax.map(
        propose,
        (
            jnp.moveaxis(hidden.reshape(passes, rows, slices, size, width), 2, 0),
            jnp.moveaxis(uniform.reshape(rows, slices, size), 1, 0),
        ),
    )
    return jax.tree.map(lambda part: jnp.moveaxis(part, 0, 1).reshape(rows, positions), parts)


def _ranks(score: Array) -> Array:
    """Place of every entry in its row, 0 the highest; of equal ones the first comes first. [B, S] -> [B, S]"""
    here, there = score[..., :, None], score[..., None, :]
    place = jnp.arange(score.shape[-1])
    # Counting pairs fuses into one pass; a row is at most a completion long, too short for two sorts to pay.
    return jnp.sum((there > here) | ((there == here) & (place < place[:, None])), axis=-1)


def _select(
    settings: SamplerConfig, eligible: Array, confidence: Array, score: Array, step_in_block: Array, key: Array
) -> Array:
    """Which of the eligible positions [B, S] this step commits; a postponed candidate's score is `_LOWEST`."""
    strategy = STRATEGIES[settings.strategy]
    order_key, coin_key = jax.random.split(key)
    if settings.alg_temp > 0:
        # The largest of logit + Gumbel noise are draws without replacement from the softmax of the logits.
        noisy = score / settings.alg_temp + jax.random.gumbel(order_key, score.shape)
        score = jnp.where(score > _LOWEST, noisy, _LOWEST)
    rank = _ranks(jnp.where(eligible, score, -jnp.inf))

    if settings.threshold is not None:
        return eligible & ((confidence >= settings.threshold) | (rank == 0))
    if settings.factor is not None:
        place = _ranks(jnp.where(eligible, confidence, -jnp.inf))
        # (n + 1)(1 - c_n) grows with n, so the places that pass are a prefix.
        return eligible & (((place + 2) * (1 - confidence) < settings.factor) | (rank == 0))

    last = step_in_block == settings.steps_per_block - 1
    if not strategy.timed:
        each, extra = divmod(settings.block_length, settings.steps_per_block)
        return eligible & (rank < each + (step_in_block < extra))

    times = np.linspace(1, settings.eps, settings.steps_per_block + 1, dtype=np.float32)
    share = jnp.asarray(1 - times[1:] / times[:-1])[step_in_block]
    if strategy.independent:
        return eligible & (last | (jax.random.uniform(coin_key, score.shape) < share))
    masked = jnp.sum(eligible)
    rows = eligible.shape[0]
    # Rows differ in their number of masked tokens only when masks can be proposed; then the last step too goes by the
    # mean over the batch, as in the reference.
    rest = eligible.shape[1] if settings.forbid_mask else masked // rows
    count = jnp.where(last, rest, jnp.floor(masked.astype(jnp.float32) / rows * share).astype(jnp.int32))
    return eligible & (rank < count)


def _finished(config: DenoiserConfig, completion: Array) -> Array:
    """[B]: an EOS is committed and nothing before it is masked."""
    masked_before = jnp.cumsum(completion == config.mask_token_id, axis=1)
    return jnp.any((completion == config.eos_token_id) & (masked_before == 0), axis=1)


def _step(
    config: DenoiserConfig,
    base: dict,
    lora: LoRA | None,
    prompt_mask: Array | None,
    key: Array,
    settings: SamplerConfig,
    state: _State,
) -> _State:
    rows = state.tokens.shape[0]
    prompt_length = state.tokens.shape[1] - settings.completion_length
    block_end = (state.block + 1) * settings.block_length
    # Outside the active block the head can matter only if masks may be left behind there.
    active_only = settings.forbid_mask and settings.blocks > 1
    size = settings.block_length if active_only else settings.completion_length
    start = block_end - size if active_only else jnp.zeros_like(block_end)
    token_key, order_key, select_key = jax.random.split(jax.random.fold_in(key, state.step), 3)

    with jax.named_scope("denoise"):
        inputs, mask = state.tokens, prompt_mask
        if settings.cfg_scale > 0:
            in_prompt = jnp.arange(inputs.shape[1]) < prompt_length
            inputs = jnp.concatenate([inputs, jnp.where(in_prompt, config.mask_token_id, inputs)])
            mask = None if mask is None else jnp.concatenate([mask, mask])
        hidden = hidden_states(config, base, lora, inputs, prompt_mask=mask)
        hidden = lax.dynamic_slice_in_dim(hidden, prompt_length + start, size, axis=1)

    with jax.named_scope("propose"):
        uniform = jax.random.uniform(token_key, (rows, size))
        token, confidence, score = _propose(
            config, base, hidden.reshape(-1, rows, *hidden.shape[1:]), uniform, settings
        )

    with jax.named_scope("commit"):
        old = lax.dynamic_slice_in_dim(state.tokens, prompt_length + start, size, axis=1)
        eligible = (old == config.mask_token_id) & (start + jnp.arange(size) < block_end)
        if STRATEGIES[settings.strategy].uniform:
            score = jax.random.uniform(order_key, score.shape)
        postponed = jnp.isin(token, jnp.asarray(settings.suppress_confidence, jnp.int32))
        commit = _select(
            settings,
            eligible,
            jnp.where(postponed, _LOWEST, confidence),
            jnp.where(postponed, _LOWEST, score),
            state.step_in_block,
            select_key,
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
) -> Rollout:
    """`sample` without its checks: the jitted program itself."""
    rows, prompt_length = prompts.shape
    prompt_mask = None if prompt_mask is None else prompt_mask.astype(bool)
    shape = (rows, settings.completion_length)
    zero = jnp.zeros((), jnp.int32)
    start = _State(
        jnp.concatenate([prompts.astype(jnp.int32), jnp.full(shape, config.mask_token_id, jnp.int32)], axis=1),
        jnp.full(shape, settings.step_limit, jnp.int32),
        jnp.full(shape, -jnp.inf, jnp.float32),
        zero,
        zero,
        zero,
    )

    def unfinished(state: _State) -> Array:
        more = state.block < settings.blocks
        if settings.stop_at_eos:
            more &= ~jnp.all(_finished(config, state.tokens[:, prompt_length:]))
        return more

    step = functools.partial(_step, config, base, lora, prompt_mask, key, settings)
    tokens, commit_step, confidence, *_ = lax.while_loop(unfinished, step, start)
    if settings.stop_at_eos:
        completion = tokens[:, prompt_length:]
        fill = (completion == config.mask_token_id) & _finished(config, completion)[:, None]
        tokens = tokens.at[:, prompt_length:].set(jnp.where(fill, config.eos_token_id, completion))
    return Rollout(tokens, commit_step, confidence)
