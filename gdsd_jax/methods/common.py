"""What methods share: the batch that they see, the contract that they fulfil, and the pieces of their equations.

Advantages, draws of masks, weights of views, clips, the PPO term, KL estimators and group softmaxes stand here once.

A method turns a rollout into a loss in five pure steps. Only `prepare` sees the whole batch: everything that couples
rows (group means, denominators, softmaxes) happens there, without gradient, so that `objective` is a plain sum over
rows and splitting it into micro-batches changes nothing but rounding.

B rows, G completions per group, M views, L completion tokens, T = P + L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gdsd_jax.diffusion import SamplerConfig, masking
from gdsd_jax.diffusion.scoring import Views
from gdsd_jax.errors import UserError

MASKINGS = ("stratified", "rollout_order", "rollout_order_random")
# exp of more than this overflows float32 and turns an advantage of 0 into NaN.
LARGEST_EXPONENT = 80.0


@flax.struct.dataclass
class Batch:
    """Rollouts with their rewards, as methods see them. Rows of a group stand together.

    Attributes:
      tokens: `[B, T]` int32, clean prompts and completions.
      prompt_mask: `[B, P]` bool, True on real tokens, or None: everything is attended to.
      completion_mask: `[B, L]` float32, 1 up to and including the first EOS.
      rewards: `[B]` float32, or None where `advantages` is given.
      advantages: `[B]` float32, or None: the method computes its own from the rewards.
      commit_step: `[B, L]` int32, the denoising step at which the sampler committed each token, or None.
      confidence: `[B, L]` float32, the probability that the token had then, or None.
      log_prob: `[B, L]` float32, the log-probability at which the sampler drew it, after temperature, top_p and top_k,
        or None.
      entropy: `[B, L]` float32, the entropy of the distribution of which `confidence` is a probability, or None.
      step_rewards: `[B, S]` float32, rewards of partial completions, where a method uses them, or None.
      group_size: static, G.
      sampler: static, the settings that the completions were sampled with, or None.
    """

    tokens: Any
    prompt_mask: Any
    completion_mask: Any
    rewards: Any = None
    advantages: Any = None
    commit_step: Any = None
    confidence: Any = None
    log_prob: Any = None
    entropy: Any = None
    step_rewards: Any = None
    group_size: int = flax.struct.field(pytree_node=False, default=1)
    sampler: SamplerConfig | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def completion_length(self) -> int:
        return self.completion_mask.shape[1]

    @property
    def prompt_length(self) -> int:
        return self.tokens.shape[1] - self.completion_length


class Scores(NamedTuple):
    """What an objective compares between policies; rows first.

    guided: the quantity whose change against the old policy the method steers.
    normalised: the likelihood-like quantity that the KL to the reference compares.
    extra: what else the objective needs of the views, a dictionary of arrays with rows first (weights of tokens,
      diagnostics), or None. Read from the new scores only.
    """

    guided: Any
    normalised: Any
    extra: Any = None


class Method(NamedTuple):
    """One objective, as functions. `gdsd_jax.methods.METHODS` lists them; the trainer never asks which it runs.

    reads: per-token quantities asked of the scorer, see `gdsd_jax.diffusion.scoring.read_tokens`.
    masks: `(key, batch) -> masked [M, B, T]`, drawn once per inner update and used by old, reference and new alike.
    views: `(masked, batch) -> Views`, adds what follows from the masks: coupled views and weights.
    score: `({read: [R, B, L]}, views) -> Scores`.
    prepare: `(batch, old Scores | None, ref Scores | None) -> constants`, a pytree of arrays with rows first. With
      `current` it takes a fourth argument, the detached scores of the policy as it is before this inner update.
    objective: `(new Scores, constants) -> ({component: [B]}, {metric: [B]})`. The loss is the sum of its components and
      of rows; components are named ("objective", "kl"), so that the gradient of each can be measured. Where the
      constants hold no old scores, old is the stop-gradient of new: the first inner update after a rollout, exactly.
    needs_reference: whether `prepare` uses the reference's scores.
    old: "unused" (no old policy), "ratio" (old only enters differences with new, so the first inner update needs no
      forward for it), "always" (`prepare` couples rows through it), or "own_masks": always, and on masks of its own,
      drawn once for all inner updates of a rollout.
    current: whether `prepare` couples rows through the scores of the policy that is being updated.
    records: whether the batch must hold the rollout's `log_prob` and `entropy`.
    """

    reads: tuple
    masks: Callable
    views: Callable
    score: Callable
    prepare: Callable
    objective: Callable
    needs_reference: bool
    old: str = "ratio"
    current: bool = False
    records: bool = False

    def constants(self, batch: Batch, old: Scores | None, ref: Scores | None, current: Scores | None) -> Any:
        """Calls `prepare` with what it takes, and cuts every gradient."""
        scores = (old, ref, current) if self.current else (old, ref)
        return jax.lax.stop_gradient(self.prepare(batch, *jax.lax.stop_gradient(scores)))


def require(condition: bool, what: str) -> None:
    """Raises UserError on a setting out of range."""
    if not condition:
        raise UserError(f"{what}: change the method's settings")


def require_clip(settings: Any) -> None:
    """Checks `eps_low`, `eps_high` and `beta` of a settings value."""
    smallest = min(settings.eps_low, settings.eps_high, settings.beta)
    require(smallest >= 0, "eps_low, eps_high and beta must not be negative")


# ---------------------------------------------------------------------------------------------------------- advantages


def advantages(batch: Batch, own: Callable[[Array, int], Array]) -> Float[Array, " B"]:
    """The advantages that were given with the batch, else the method's own: `own(rewards, group_size)`."""
    return batch.advantages if batch.advantages is not None else own(batch.rewards, batch.group_size)


def leave_one_out(rewards: Float[Array, " B"], group_size: int, *, scale: bool = False) -> Float[Array, " B"]:
    """`A_i = r_i - mean of the other G - 1 rewards of its group`, over `std + 1e-4` (sample std) with `scale`."""
    require(group_size > 1, f"group_size {group_size} leaves a leave-one-out advantage nothing to compare with")
    groups = rewards.reshape(-1, group_size)
    others = (jnp.sum(groups, axis=1, keepdims=True) - groups) / (group_size - 1)
    advantages = groups - others
    if scale:
        advantages = advantages / (jnp.std(groups, axis=1, ddof=1, keepdims=True) + 1e-4)
    return advantages.reshape(-1)


def centred(rewards: Float[Array, " B"], group_size: int) -> Float[Array, " B"]:
    """`A_i = r_i - mean of its group`."""
    groups = rewards.reshape(-1, group_size)
    return (groups - jnp.mean(groups, axis=1, keepdims=True)).reshape(-1)


def standardised(rewards: Float[Array, " B"], group_size: int) -> Float[Array, " B"]:
    """`A_i = (r_i - mean) / std` of its group (population std); 0 in a group without spread."""
    groups = rewards.reshape(-1, group_size)
    deviation = jnp.std(groups, axis=1, keepdims=True)
    flat = deviation < 1e-6
    scaled = (groups - jnp.mean(groups, axis=1, keepdims=True)) / jnp.where(flat, 1.0, deviation)
    return jnp.where(flat, 0.0, scaled).reshape(-1)


# --------------------------------------------------------------------------------------------------------------- masks


def stratified_masks(views: int, order: str = "stratified", block_length: int | None = None) -> Callable:
    """`(key, batch) -> masked [M, B, T]`: for each view one stratified draw over every group.

    `order` is one of `MASKINGS`: uniform positions, or the order of the rollout in blocks of `block_length`.
    """

    def masks(key: Array, batch: Batch) -> Bool[Array, "M B T"]:
        block, confidence = None, None
        if order != "stratified":
            block = block_length or batch.completion_length
            confidence = batch.confidence if order == "rollout_order" else None

        def draw(key: Array) -> Array:
            rows, length = batch.completion_mask.shape
            return masking.stratified(
                key, rows, length, stratum=batch.group_size, confidence=confidence, block_length=block
            )

        return masking.behind_prompt(jax.vmap(draw)(jax.random.split(key, views)), batch.prompt_length)

    return masks


def whole_completion(prompt_rate: float) -> Callable:
    """`(key, batch) -> masked [1, B, T]`: the completion, and each prompt token with probability `prompt_rate`."""

    def masks(key: Array, batch: Batch) -> Bool[Array, "1 B T"]:
        prompt = masking.bernoulli(key, prompt_rate, batch.tokens.shape[0], batch.prompt_length)
        return jnp.concatenate([prompt, jnp.ones(batch.completion_mask.shape, bool)], axis=1)[None]

    return masks


# --------------------------------------------------------------------------------------------------------------- views


def own_views(masked: Bool[Array, "M B T"], batch: Batch, weights: Float[Array, "M B L"]) -> Views:
    """Each mask is a view, read by itself with these weights."""
    return Views(masked, weights, tuple((m,) for m in range(masked.shape[0])))


def coupled_views(masked: Bool[Array, "M B T"], batch: Batch, *, weighted: bool) -> Views:
    """Each view with its complement, so that every completion token is predicted exactly once.

    The weights carry the half that makes the pair an average: 1/2 (plain), or with `weighted` the ELBO's
    `1/2 (L+1)/x` in the first view and `1/2 (L+1)/(L-x)` in the complement, `x` masked tokens (GDSD, ESPO).
    """
    completion = masked[:, :, batch.prompt_length :]
    weights = jnp.full(completion.shape, 0.5, jnp.float32)
    if weighted:
        weights = 0.5 * (batch.completion_length + 1) / count_in_view(completion)
    return coupled(masked, batch, weights)


def coupled(masked: Bool[Array, "M B T"], batch: Batch, weights: Float[Array, "M B L"]) -> Views:
    """Each view with its complement, and each token read from the one that masks it, with these weights."""
    pairs = jnp.stack([masked, masking.complement(masked, batch.prompt_length)], axis=1)
    sources = tuple((2 * m, 2 * m + 1) for m in range(masked.shape[0]))
    return Views(pairs.reshape(-1, *masked.shape[1:]), weights, sources)


def count_in_view(completion: Bool[Array, "M B L"]) -> Float[Array, "M B L"]:
    """For each token of a coupled pair, how many the view that masks it masks: `x` or `L - x`; at least 1."""
    count = jnp.sum(completion, axis=-1, keepdims=True)
    in_view = jnp.where(completion, count, completion.shape[-1] - count)
    return jnp.maximum(in_view, 1).astype(jnp.float32)


def weighted_sum(values: Float[Array, "R B L"], views: Views) -> Float[Array, "B R"]:
    """`sum_k w_k l_k` of every row and read, in float32, rows first."""
    return jnp.sum(views.weights * values, axis=-1, dtype=jnp.float32).T


# ---------------------------------------------------------------------------------------------------------- objectives


def log_clip(difference: Array, eps_low: float, eps_high: float) -> tuple[Array, Array]:
    """Clips a log-ratio to `[log(1 - eps_low), log(1 + eps_high)]` and says where that acted (float32 0 or 1).

    `eps_low >= 1` leaves the lower side open, an infinite `eps_high` the upper one.
    """
    low = math.log1p(-eps_low) if eps_low < 1 else -math.inf
    high = math.log1p(eps_high)
    clipped = ((difference < low) | (difference > high)).astype(jnp.float32)
    return jnp.clip(difference, low, high), clipped


def old_or_new(old: Array | None, new: Array) -> Array:
    """The old policy's score; at the first inner update, when none is given, the stop-gradient of the new one."""
    return jax.lax.stop_gradient(new) if old is None else old


def spread(scores: Float[Array, "B M"]) -> Float[Array, " B"]:
    """Standard deviation across views: how noisy the score of one completion is."""
    return jnp.std(jax.lax.stop_gradient(scores), axis=1)


def per_row(value: Any, rows: int) -> Float[Array, " rows"]:
    """A scalar of the whole batch as a constant of each row, so that micro-batches can be cut from it."""
    return jnp.full(rows, value, jnp.float32)


def ratio_of(log_ratio: Array) -> Array:
    """`exp(log_ratio)`, kept finite."""
    return jnp.exp(jnp.minimum(log_ratio, LARGEST_EXPONENT))


def ppo(log_ratio: Array, advantage: Array, eps_low: float, eps_high: float) -> tuple[Array, Array]:
    """`-min(r A, clip(r) A)` with `r = exp(log_ratio)`, `clip` to `[1 - eps_low, 1 + eps_high]`; and where it clips.

    The second value is 1.0 where the clipped branch is the smaller one: the gradient is exactly zero there. On a tie,
    as at the first inner update with `eps = 0`, the gradient is that of the ratio.
    """
    ratio = ratio_of(log_ratio)
    free, held = ratio * advantage, jnp.clip(ratio, 1 - eps_low, 1 + eps_high) * advantage
    clipped = free > held
    return -jnp.where(clipped, jax.lax.stop_gradient(held), free), clipped.astype(jnp.float32)


def k1(new: Array, ref: Array) -> Array:
    """`d = l_theta - l_ref`, with the score-function gradient `d grad(l_theta)` that its expectation needs."""
    difference = new - ref
    return difference + jax.lax.stop_gradient(difference) * (new - jax.lax.stop_gradient(new))


def k2(new: Array, ref: Array) -> Array:
    """`d^2 / 2`, `d = l_theta - l_ref`."""
    return 0.5 * (new - ref) ** 2


def k3(new: Array, ref: Array) -> Array:
    """`exp(-d) + d - 1`, `d = l_theta - l_ref`."""
    difference = new - ref
    return ratio_of(-difference) + difference - 1


KL = {"k1": k1, "k2": k2, "k3": k3}


def mean_weights(mask: Float[Array, "B L"]) -> Float[Array, "B L"]:
    """Weights that sum to the mean over the tokens of the mask in the whole batch; denominator at least 1."""
    return mask / jnp.maximum(jnp.sum(mask), 1.0)


def group_softmax(values: Float[Array, " B"], group_size: int) -> Float[Array, " B"]:
    """Softmax over the rows of each group."""
    return jax.nn.softmax(values.reshape(-1, group_size), axis=1).reshape(-1)


def effective_share(weights: Float[Array, " B"], group_size: int) -> Float[Array, " B"]:
    """Effective sample size `1 / sum w^2` of each group's weights over its size: 1 uniform, 1/G a single winner."""
    groups = weights.reshape(-1, group_size)
    share = 1 / (jnp.sum(groups**2, axis=1, keepdims=True) * group_size)
    return jnp.broadcast_to(share, groups.shape).reshape(-1)
