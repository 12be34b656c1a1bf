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
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gdsd_jax.diffusion import masking
from gdsd_jax.diffusion.scoring import Views
from gdsd_jax.methods.method import Batch
from gdsd_jax.runtime.errors import UserError

MASKINGS = ("stratified", "rollout_order", "rollout_order_random")
# exp of more than this overflows float32 and turns an advantage of 0 into NaN.
LARGEST_EXPONENT = 80.0








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


def by_component(batch: Batch, own: Callable[[Array, int], Array]) -> Float[Array, " B"]:
    """Returns the weighted sum of the advantages that `own(rewards, group_size)` finds in each reward component alone.

    A component with a large spread does not drown the others once `own` normalises (GDPO, arXiv 2601.05242).
    """
    parts = [own(batch.components[:, index], batch.group_size) for index in range(batch.components.shape[1])]
    return sum(weight * part for (_, weight), part in zip(batch.component_weights, parts, strict=True))


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


def scaled(rewards: Float[Array, " B"], group_size: int) -> Float[Array, " B"]:
    """`A_i = (r_i - mean) / (std + 1e-4)` of its group (sample std); 0 in a group without spread."""
    deviation = jnp.repeat(jnp.std(rewards.reshape(-1, group_size), axis=1, ddof=1), group_size)
    return jnp.where(deviation < 1e-6, 0.0, centred(rewards, group_size) / (deviation + 1e-4))


def group_mean(values: Float[Array, " B"], group_size: int) -> Float[Array, " B"]:
    """The mean of its group, for each row."""
    return jnp.repeat(jnp.mean(values.reshape(-1, group_size), axis=1), group_size)


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
    # Not `clip`, which at a bound passes on half of the gradient: with eps = 0 every row starts at both.
    return jnp.where(difference < low, low, jnp.where(difference > high, high, difference)), clipped


def old_or_new(old: Array | None, new: Array) -> Array:
    """The old policy's score; at the first inner update, when none is given, the stop-gradient of the new one."""
    return jax.lax.stop_gradient(new) if old is None else old


def size_of(name: str, values: Float[Array, "B ..."]) -> dict[str, Float[Array, " B"]]:
    """Returns two metrics of every row: the mean and, as `NAME_max`, the largest of the absolute values."""
    sizes = jnp.abs(values).reshape(values.shape[0], -1)
    return {name: jnp.mean(sizes, axis=1), f"{name}_max": jnp.max(sizes, axis=1)}


def pull_of(error: Float[Array, "B M"], length: Float[Array, " B"]) -> dict[str, Float[Array, " B"]]:
    """Returns metrics of a squared error: its size, and the slope `2 error / L` with which it pulls at the score.

    The slope leaves the clip's zero aside; as `pull_std` its spread over rows is logged.
    """
    pull = 2 * jnp.mean(error, axis=1) / length
    return {"residual": jnp.mean(jnp.abs(error), axis=1), "pull": jnp.abs(pull), "pull_std": pull}


def spread(scores: Float[Array, "B M"]) -> Float[Array, " B"]:
    """Standard deviation across views: how noisy the score of one completion is."""
    return jnp.std(jax.lax.stop_gradient(scores), axis=1)


def per_row(value: Any, rows: int) -> Float[Array, " rows"]:
    """A scalar of the whole batch as a constant of each row, so that micro-batches can be cut from it."""
    return jnp.full(rows, value, jnp.float32)


def ratio_of(log_ratio: Array) -> Array:
    """Returns `exp(log_ratio)`, beyond `LARGEST_EXPONENT` its tangent there: finite, with a slope of the right sign."""
    beyond = jnp.maximum(log_ratio - LARGEST_EXPONENT, 0.0)
    # The tangent would overflow in the end: then its value stays, and its slope too.
    beyond = beyond - jax.lax.stop_gradient(jnp.maximum(beyond - 1000.0, 0.0))
    return jnp.exp(jnp.minimum(log_ratio, LARGEST_EXPONENT)) * (1 + beyond)


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
