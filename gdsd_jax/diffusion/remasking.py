"""Defines the settings of the sampler, and selects the positions that a step commits: schedules, orders, thresholds.

B rows, S positions of the step's region, L completion tokens, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gdsd_jax.runtime.errors import UserError, did_you_mean

CACHES = ("none", "prefix", "dual")
LOWEST = jnp.finfo(jnp.float32).min


class Strategy(NamedTuple):
    """Describes how a strategy schedules, scores and selects.

    timed: commits per step follow the time schedule linspace(1, eps); otherwise they are split evenly over the steps.
    score: a function from the probabilities of the proposal [..., V] and that of the candidate [...] to scores [...];
        None: the score is not computed from these probabilities.
    uniform: the order of the commits is uniform noise.
    independent: each masked position is committed with a probability of its own (implies `timed`).
    leftmost: positions are committed from left to right.
    plan: for strategies that plan a block ahead, a function from the numbers of masked tokens and of steps of a block
        to the commits of each step. Such strategies may take fewer steps, and their last block may be shorter.
    """

    timed: bool
    score: Callable | None = None
    uniform: bool = False
    independent: bool = False
    leftmost: bool = False
    plan: Callable[[int, int], list[int]] | None = None


def _margin(probs: Array, _: Array) -> Array:
    best = jnp.argmax(probs, axis=-1, keepdims=True)
    others = jnp.where(jnp.arange(probs.shape[-1]) == best, -jnp.inf, probs)
    return jnp.max(probs, axis=-1) - jnp.max(others, axis=-1)


def _masked_linear(time: np.float32) -> np.float32:
    return np.float32(1) - (np.float32(1) - time)


def _masked_cosine(time: np.float32) -> np.float32:
    return np.float32(1) - (np.float32(1) - np.cos(np.float32(math.pi / 2) * (np.float32(1) - time)))


def _mdlm(masked_share: Callable, masked: int, steps: int) -> list[int]:
    """Plans the commits of each step such that the share of masked tokens follows `masked_share` (dllm's MDLM sampler).

    A step from time t to time s commits round(n (1 - m(s) / m(t))) of the `n` tokens that are left, where m is the
    masked share. Steps that would commit nothing are left out.
    """
    counts = []
    for step in range(steps):
        later, now = (masked_share(np.float32((steps - at) / steps)) for at in (step + 1, step))
        counts.append(int(np.rint(masked * (1 - float(later / now)))))
        masked -= counts[-1]
    return [count for count in counts if count]


STRATEGIES = {
    "low_confidence": Strategy(timed=False),
    "random": Strategy(timed=False, uniform=True),
    "maskgit_plus": Strategy(timed=True, score=lambda probs, candidate: candidate),
    "topk_margin": Strategy(timed=True, score=_margin),
    "entropy": Strategy(timed=True, score=lambda probs, _: jnp.sum(probs * jnp.log(probs + 1e-10), axis=-1)),
    "origin": Strategy(timed=True, uniform=True, independent=True),
    "sequential": Strategy(timed=False, leftmost=True),
    "mdlm": Strategy(timed=False, plan=functools.partial(_mdlm, _masked_linear)),
    "mdlm_cosine": Strategy(timed=False, plan=functools.partial(_mdlm, _masked_cosine)),
}


@dataclass(frozen=True)
class SamplerConfig:
    """Holds the settings of `sample`; it is hashable, and each distinct value compiles a program of its own.

    completion_length: L, tokens to generate.
    steps: denoising steps of the whole completion; each of the blocks gets max(1, steps // blocks),
        rounded up instead of down for mdlm and mdlm_cosine.
    block_length: blocks are finished left to right; L means no blocks. A block-causal denoiser writes its own blocks,
        of which this is a divisor: then parts of a block are finished left to right.
    strategy: schedule, proposal noise and ordering together.
        low_confidence, random: tokens per step split evenly over the block's steps; ordered by the candidate's
            probability under the plain logits, or by uniform noise.
        maskgit_plus, topk_margin, entropy, origin: time schedule linspace(1, eps, steps + 1) inside each block. A step
            from time t to time s commits floor(n (1 - s/t)) of the n masked tokens, the last step all of them. They are
            ordered by the candidate's probability, by the margin between the two best tokens, or by negative entropy,
            all after temperature, top_p and top_k. origin commits each masked token with probability 1 - s/t.
        sequential: as low_confidence, from left to right.
        mdlm, mdlm_cosine: ordered as low_confidence. Commits are planned at the start of each block, in at most
            ceil(steps / blocks) steps, so that the share of masked tokens at time t is t, or cos(pi (1 - t) / 2).
    temperature: temperature of the proposal; 0 takes the argmax.
    top_p, top_k: cut the proposal of every strategy, top_p first; tokens that tie at the cut stay.
    cfg_scale: s in un + (s + 1)(cond - un), where the unconditional pass sees a masked prompt; 0 skips that pass.
    alg_temp: draws the positions from softmax(score / alg_temp) instead of taking the best; 0 takes the best.
    eps: last time of the time schedule.
    threshold: instead of a schedule, commit every candidate of at least this probability (plain logits), and always
        the strategy's first choice.
    factor: instead of a schedule, commit the n most probable candidates, n the largest with
        (n + 1)(1 - c_n) < factor, c_n the n-th highest probability (plain logits), and always the strategy's first
        choice. As with `threshold`, a block takes as many steps as it needs, at most block_length, whatever `steps` is.
    floor: with a threshold, commit at least as many as the schedule of `steps` would.
    lead: if logits predict the next token, a block-causal denoiser commits the first token of each block in a step of
        its own, before it reads any other position of the block.
    grow: later blocks do not exist until the blocks before them are finished, instead of being seen as masks; with
        `stop_at_eos`, a rollout stops only after a finished block.
    end_think: token ids of a text that ends thinking. Until a completion holds it, the logit of one of these ids is
        raised at the block's first masked position: of the id that continues the text from the tokens before it.
    end_think_boost: the number that is added to this logit at the last position of the completion.
    end_think_power: p; at the share x of the completion, `x^p` times the boost is added.
    hide_pads: a block-causal denoiser forgets pad tokens that it has written: they are not attended to and take no
        position.
    cache: the tokens whose keys and values are kept while a block is decoded, which is an approximation. "none": no
        tokens; "prefix": those before the block; "dual": all outside the block. A block-causal denoiser always keeps
        those of finished blocks, which is exact; with "dual" it also keeps the rest of the block while it decodes a
        part of it.
    refresh_every: steps of a block from one full pass to the next, which refreshes the cache; None: only the first
        step of a block is one. 1 makes every step exact.
    stop_at_eos: stop once every row has committed an EOS with nothing masked before it; all masks then become EOS.
    suppress: token ids that are never proposed.
    suppress_confidence: token ids that are committed only when nothing else is left to commit.
    forbid_mask: never propose the mask token. False reproduces the public samplers, which may propose it: such a
        position counts as committed, stays masked, and may be written again later.
    record: returns `Rollout.log_prob` and `Rollout.entropy` too; the tokens are the same.

    Raises UserError if a setting is out of range, or if two settings contradict each other.
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
    record: bool = False
    floor: bool = False
    lead: bool = False
    grow: bool = False
    hide_pads: bool = False
    end_think: Sequence[int] = ()
    end_think_boost: float = 0.0
    end_think_power: float = 2.0

    def __post_init__(self) -> None:
        for name in ("suppress", "suppress_confidence", "end_think"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for wrong, message in (
            (self.completion_length < 1, f"completion_length is {self.completion_length}; it must be at least 1"),
            (self.block_length < 1, f"block_length is {self.block_length}; it must be at least 1"),
            (self.steps < 1, f"steps is {self.steps}; it must be at least 1"),
            (
                self.block_length >= 1
                and self.completion_length % self.block_length
                and not (self.strategy in STRATEGIES and STRATEGIES[self.strategy].plan),
                f"completion_length {self.completion_length} is not a multiple of block_length {self.block_length}; "
                "change one of them in config.sampler",
            ),
            (
                self.strategy not in STRATEGIES,
                f"strategy {self.strategy!r} is unknown; choose one of {', '.join(STRATEGIES)}"
                + did_you_mean(self.strategy, STRATEGIES),
            ),
            (not ((t := self.temperature) == 0 or t >= 1e-30), f"temperature is {t}; it must be 0 or at least 1e-30"),
            (
                self.top_p is not None and not 0 < self.top_p <= 1,
                f"top_p is {self.top_p}; it must be above 0 and at most 1, or None",
            ),
            (self.top_k is not None and self.top_k < 1, f"top_k is {self.top_k}; it must be at least 1, or None"),
            (not self.cfg_scale >= 0, f"cfg_scale is {self.cfg_scale}; it must be 0 (off) or more"),
            (not ((t := self.alg_temp) == 0 or t >= 1e-30), f"alg_temp is {t}; it must be 0 or at least 1e-30"),
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
            (self.cache not in CACHES, f"cache is {self.cache!r}; choose one of {', '.join(CACHES)}"),
            (
                self.refresh_every is not None and self.cache == "none",
                "refresh_every has no meaning without a cache; set cache to 'prefix' or 'dual', or refresh_every=None",
            ),
            (self.floor and self.threshold is None, "floor has no meaning without a threshold; set floor=False"),
            (
                not 0 <= self.end_think_boost < math.inf or not 0 <= self.end_think_power < math.inf,
                f"end_think_boost {self.end_think_boost} and end_think_power {self.end_think_power}: each must be a "
                "number of at least 0",
            ),
            (
                bool(self.end_think_boost) != bool(self.end_think),
                "end_think needs end_think_boost above 0, and end_think_boost needs end_think: set both or neither",
            ),
            (self.grow and self.cache != "none", "grow needs every step exact; set cache='none' or grow=False"),
            (
                self.refresh_every is not None and self.refresh_every < 1,
                f"refresh_every is {self.refresh_every}; it must be at least 1, or None",
            ),
        ):
            if wrong:
                raise UserError(message)

    @property
    def blocks(self) -> int:
        """Returns the number of blocks in a completion."""
        return -(-self.completion_length // self.block_length)

    @property
    def scheduled_steps(self) -> int:
        """Returns the number of steps that the schedule gives a block."""
        planned = STRATEGIES[self.strategy].plan is not None
        return max(1, -(-self.steps // self.blocks) if planned else self.steps // self.blocks)

    @property
    def steps_per_block(self) -> int:
        """Returns the largest number of steps that one block takes.

        It is that of the schedule; with a threshold or a factor it is one step per token of the block.
        """
        scheduled = self.threshold is None and self.factor is None
        return self.scheduled_steps if scheduled else self.block_length

    @property
    def step_limit(self) -> int:
        """Returns the `commit_step` of positions that no step wrote: `steps`, or more if the blocks may take more."""
        return max(self.steps, self.blocks * self.steps_per_block)


@functools.cache
def commit_plan(settings: SamplerConfig) -> np.ndarray:
    """Returns a table `[n, step]` of the commits in a block with n masked tokens at its start, filled up with zeros.

    The settings must have a strategy that plans.
    """
    plan = STRATEGIES[settings.strategy].plan
    assert plan is not None, f"the strategy {settings.strategy} follows no plan"
    plans = [plan(masked, settings.scheduled_steps) for masked in range(settings.block_length + 1)]
    longest = max(map(len, plans))
    return np.array([commits + [0] * (longest - len(commits)) for commits in plans], np.int32)


def ranks(score: Array) -> Array:
    """Returns the rank of every score in its row, [B, S] -> [B, S]; the highest has rank 0, ties go to the first."""
    here, there = score[..., :, None], score[..., None, :]
    place = jnp.arange(score.shape[-1])
    # The compiler fuses the counting of pairs into one pass; two sorts would be slower for rows of this length.
    return jnp.sum((there > here) | ((there == here) & (place < place[:, None])), axis=-1)


def select(
    settings: SamplerConfig,
    eligible: Array,
    confidence: Array,
    score: Array,
    step_in_block: Array,
    keys: Array,
    started: Array | None = None,
) -> Array:
    """Selects the `eligible` positions [B, S] that this step commits.

    Args:
      confidence, score: [B, S], of the candidates; both are `LOWEST` for postponed candidates.
      keys: random keys of this step, [B], one for each row.
      started: the numbers of tokens that were masked at the block's start, [B]; for strategies that plan.
    """
    strategy = STRATEGIES[settings.strategy]
    pairs, width = jax.vmap(jax.random.split)(keys), score.shape[1:]
    if settings.alg_temp > 0:
        # The largest values of logit + Gumbel noise are draws without replacement from the softmax of the logits.
        noisy = score / settings.alg_temp + jax.vmap(lambda key: jax.random.gumbel(key, width))(pairs[:, 0])
        score = jnp.where(score > LOWEST, noisy, LOWEST)
    rank = ranks(jnp.where(eligible, score, -jnp.inf))

    if settings.threshold is not None:
        least = jnp.int32(1)
        if settings.floor:
            each, extra = divmod(settings.block_length, settings.scheduled_steps)
            least = jnp.maximum(each + (step_in_block < extra), 1)
        return eligible & ((confidence >= settings.threshold) | (rank < least))
    if settings.factor is not None:
        place = ranks(jnp.where(eligible, confidence, -jnp.inf))
        # (n + 1)(1 - c_n) grows with n, so the places that pass are a prefix.
        return eligible & (((place + 2) * (1 - confidence) < settings.factor) | (rank == 0))

    if strategy.plan is not None:
        return eligible & (rank < jnp.asarray(commit_plan(settings))[started, step_in_block][:, None])
    last = step_in_block == settings.steps_per_block - 1
    if strategy.independent:
        coin = jax.vmap(lambda key: jax.random.uniform(key, width))(pairs[:, 1])
        coin = coin < time_shares(settings)[step_in_block]
        postponed = score <= LOWEST
        alone = jnp.all(~eligible | postponed, axis=1, keepdims=True)
        return eligible & (last | (coin & (~postponed | alone)))
    masked, rows = jnp.sum(eligible, axis=1, keepdims=True), 1
    if not settings.forbid_mask:
        # The public samplers, which may propose masks, count by the mean over the batch, in the last step too.
        masked, rows = jnp.sum(masked), len(eligible)
    count = scheduled_count(settings, masked.astype(jnp.float32) / rows, step_in_block)
    if strategy.timed:
        count = jnp.where(last, eligible.shape[1] if settings.forbid_mask else masked // rows, count)
    return eligible & (rank < count)


def time_shares(settings: SamplerConfig) -> Array:
    """Returns `1 - s/t` for every step of a block, which goes from time t to time s."""
    times = np.linspace(1, settings.eps, settings.steps_per_block + 1, dtype=np.float32)
    return jnp.asarray(1 - times[1:] / times[:-1])


def scheduled_count(settings: SamplerConfig, masked: Array, step_in_block: Array) -> Array:
    """Returns how many of `masked` tokens a step commits by schedule.

    Callers handle the last step of a time schedule themselves, because it commits all tokens.
    """
    if STRATEGIES[settings.strategy].timed:
        return jnp.floor(masked * time_shares(settings)[step_in_block]).astype(jnp.int32)
    each, extra = divmod(settings.block_length, settings.steps_per_block)
    return each + (step_in_block < extra)
