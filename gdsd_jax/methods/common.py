"""The pieces that several methods share: advantages, masks, weights of views, clips, KL estimators, group softmaxes.

The contract that a method fulfils is in `gdsd_jax.methods.method`.

B rows, G completions per group, M views, R reads per token, L completion tokens, T = P + L tokens.
"""

from __future__ import annotations

import functools
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
# Above 88.7, exp overflows float32, and infinity times an advantage of 0 is NaN.
LARGEST_EXPONENT = 80.0


def require(condition: bool, what: str) -> None:
    """Raises a UserError that says `what` is wrong, unless `condition` holds."""
    if not condition:
        raise UserError(f"{what}: change the method's settings")


# ---------------------------------------------------------------------------------------------------------- advantages


def advantages(batch: Batch, own: Callable[[Array, int], Array]) -> Float[Array, " B"]:
    """Returns the batch's advantages, or if it has none, `own(rewards, group_size)`."""
    return batch.advantages if batch.advantages is not None else own(batch.rewards, batch.group_size)


def by_component(batch: Batch, own: Callable[[Array, int], Array]) -> Float[Array, " B"]:
    """Returns the weighted sum of `own(component, group_size)` over the reward components.

    If `own` normalises, a component with a large spread does not dominate the others (GDPO, arXiv 2601.05242).
    """
    parts = [own(batch.components[:, index], batch.group_size) for index in range(batch.components.shape[1])]
    weighted = [weight * part for (_, weight), part in zip(batch.component_weights, parts, strict=True)]
    return functools.reduce(jnp.add, weighted)


def leave_one_out(rewards: Float[Array, " B"], group_size: int, *, scale: bool = False) -> Float[Array, " B"]:
    """Computes `A_i = r_i - mean of the other G - 1 rewards of its group`.

    With `scale`, `A_i` is divided by `std + 1e-4`, with the sample standard deviation of the group.
    """
    require(group_size > 1, f"group_size is {group_size}, and leave-one-out advantages need at least 2")
    groups = rewards.reshape(-1, group_size)
    others = (jnp.sum(groups, axis=1, keepdims=True) - groups) / (group_size - 1)
    advantages = groups - others
    if scale:
        advantages = advantages / (jnp.std(groups, axis=1, ddof=1, keepdims=True) + 1e-4)
    return advantages.reshape(-1)


def centred(rewards: Float[Array, " B"], group_size: int) -> Float[Array, " B"]:
    """Computes `A_i = r_i - mean of the rewards of its group`."""
    groups = rewards.reshape(-1, group_size)
    return (groups - jnp.mean(groups, axis=1, keepdims=True)).reshape(-1)


def scaled(rewards: Float[Array, " B"], group_size: int) -> Float[Array, " B"]:
    """Computes `A_i = (r_i - mean) / (std + 1e-4)` in each group (sample std); 0 in a group of equal rewards."""
    deviation = jnp.repeat(jnp.std(rewards.reshape(-1, group_size), axis=1, ddof=1), group_size)
    return jnp.where(deviation < 1e-6, 0.0, centred(rewards, group_size) / (deviation + 1e-4))


def group_mean(values: Float[Array, " B"], group_size: int) -> Float[Array, " B"]:
    """Returns for each row the mean of the values of its group."""
    return jnp.repeat(jnp.mean(values.reshape(-1, group_size), axis=1), group_size)


def standardised(rewards: Float[Array, " B"], group_size: int) -> Float[Array, " B"]:
    """Computes `A_i = (r_i - mean) / std` in each group (population std); 0 in a group of equal rewards."""
    groups = rewards.reshape(-1, group_size)
    deviation = jnp.std(groups, axis=1, keepdims=True)
    flat = deviation < 1e-6
    scaled = (groups - jnp.mean(groups, axis=1, keepdims=True)) / jnp.where(flat, 1.0, deviation)
    return jnp.where(flat, 0.0, scaled).reshape(-1)


# --------------------------------------------------------------------------------------------------------------- masks


def stratified_masks(views: int, order: str = "stratified", block_length: int | None = None) -> Callable:
    """Returns `(key, batch) -> masked [M, B, T]`, which covers all mask ratios evenly in each view of a group.

    Args:
      views: M.
      order: one of `MASKINGS`. "stratified" masks uniform positions; the other two follow the order of the rollout.
      block_length: the blocks of the rollout; None: no blocks.
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
    """Returns `(key, batch) -> masked [1, B, T]`, which masks the whole completion.

    It masks each prompt token with the probability `prompt_rate`.
    """

    def masks(key: Array, batch: Batch) -> Bool[Array, "1 B T"]:
        prompt = masking.bernoulli(key, prompt_rate, batch.tokens.shape[0], batch.prompt_length)
        return jnp.concatenate([prompt, jnp.ones(batch.completion_mask.shape, bool)], axis=1)[None]

    return masks


# --------------------------------------------------------------------------------------------------------------- views


def own_views(masked: Bool[Array, "M B T"], batch: Batch, weights: Float[Array, "M B L"]) -> Views:
    """Makes each mask a view of its own, in which every token is read with its weight."""
    return Views(masked, weights, tuple((m,) for m in range(masked.shape[0])))


def averaged_views(masked: Bool[Array, "M B T"], batch: Batch) -> Views:
    """Makes each mask a view in which every completion token is read, and averages over the views."""
    weights = jnp.ones((masked.shape[0], *batch.completion_mask.shape), jnp.float32)
    return own_views(masked, batch, weights / masked.shape[0])


def coupled_views(masked: Bool[Array, "M B T"], batch: Batch, *, weighted: bool) -> Views:
    """Couples each view with its complement, so that every completion token is predicted exactly once.

    The weights are 1/2, which averages over the pair. With `weighted` they are those of the ELBO: `1/2 (L+1)/x` in a
    view that masks `x` tokens, and `1/2 (L+1)/(L-x)` in its complement (GDSD, ESPO).
    """
    completion = masked[:, :, batch.prompt_length :]
    weights = jnp.full(completion.shape, 0.5, jnp.float32)
    if weighted:
        weights = 0.5 * (batch.completion_length + 1) / count_in_view(completion)
    return coupled(masked, batch, weights)


def coupled(masked: Bool[Array, "M B T"], batch: Batch, weights: Float[Array, "M B L"]) -> Views:
    """Couples each view with its complement; each token is read with its weight from the view that masks it."""
    pairs = jnp.stack([masked, masking.complement(masked, batch.prompt_length)], axis=1)
    sources = tuple((2 * m, 2 * m + 1) for m in range(masked.shape[0]))
    return Views(pairs.reshape(-1, *masked.shape[1:]), weights, sources)


def count_in_view(completion: Bool[Array, "M B L"]) -> Float[Array, "M B L"]:
    """Counts the masked tokens in that view of a coupled pair which masks a token: `x` or `L - x`, at least 1."""
    count = jnp.sum(completion, axis=-1, keepdims=True)
    in_view = jnp.where(completion, count, completion.shape[-1] - count)
    return jnp.maximum(in_view, 1).astype(jnp.float32)


def weighted_sum(values: Float[Array, "R B L"], views: Views) -> Float[Array, "B R"]:
    """Computes `sum_k w_k l_k` for every row and read, in float32, rows first."""
    return jnp.sum(views.weights * values, axis=-1, dtype=jnp.float32).T


# ---------------------------------------------------------------------------------------------------------- objectives


def log_clip(difference: Array, eps_low: float, eps_high: float) -> tuple[Array, Array]:
    """Clips a log-ratio to `[log(1 - eps_low), log(1 + eps_high)]`; also returns 1.0 where the clip acts, else 0.0.

    With `eps_low >= 1` there is no lower bound, and with an infinite `eps_high` no upper bound.
    """
    low = math.log1p(-eps_low) if eps_low < 1 else -math.inf
    high = math.log1p(eps_high)
    clipped = ((difference < low) | (difference > high)).astype(jnp.float32)
    # At a bound, `jnp.clip` would halve the gradient, and with eps = 0 every row starts at both bounds.
    return jnp.where(difference < low, low, jnp.where(difference > high, high, difference)), clipped


def old_or_new(old: Array | None, new: Array) -> Array:
    """Returns the old policy's score; if it is None (at the first inner update), the stop-gradient of the new one."""
    return jax.lax.stop_gradient(new) if old is None else old


def size_of(name: str, values: Float[Array, "B ..."]) -> dict[str, Float[Array, " B"]]:
    """Returns two metrics of each row: the mean of the absolute values and, as `NAME_max`, the largest of them."""
    sizes = jnp.abs(values).reshape(values.shape[0], -1)
    return {name: jnp.mean(sizes, axis=1), f"{name}_max": jnp.max(sizes, axis=1)}


def pull_of(error: Float[Array, "B M"], length: Float[Array, " B"]) -> dict[str, Float[Array, " B"]]:
    """Returns metrics of a squared error: the size of the error, and the slope of its square in the score.

    The slope is `2 error / L`; it ignores that a clipped score has no gradient. `pull_std` becomes the standard
    deviation of the slope over rows.
    """
    pull = 2 * jnp.mean(error, axis=1) / length
    return {"residual": jnp.mean(jnp.abs(error), axis=1), "pull": jnp.abs(pull), "pull_std": pull}


def spread(scores: Float[Array, "B M"]) -> Float[Array, " B"]:
    """Computes the standard deviation across views, which tells how noisy the score of one completion is."""
    return jnp.std(jax.lax.stop_gradient(scores), axis=1)


def per_row(value: Any, rows: int) -> Float[Array, " rows"]:
    """Repeats a scalar of the whole batch for each row, so that it can be cut into micro-batches."""
    return jnp.full(rows, value, jnp.float32)


def ratio_of(log_ratio: Array) -> Array:
    """Returns `exp(log_ratio)`, and above `LARGEST_EXPONENT` its tangent, which is finite and has a positive slope."""
    beyond = jnp.maximum(log_ratio - LARGEST_EXPONENT, 0.0)
    # The tangent would overflow too: 1000 beyond that exponent its value stays constant, while it keeps its slope.
    beyond = beyond - jax.lax.stop_gradient(jnp.maximum(beyond - 1000.0, 0.0))
    return jnp.exp(jnp.minimum(log_ratio, LARGEST_EXPONENT)) * (1 + beyond)


def ppo(log_ratio: Array, advantage: Array, eps_low: float, eps_high: float) -> tuple[Array, Array]:
    """Computes `-min(r A, clip(r) A)` with `r = exp(log_ratio)` and `clip` to `[1 - eps_low, 1 + eps_high]`.

    The second result is 1.0 where the clipped term is the smaller one, else 0.0. The gradient is exactly zero there. On
    a tie, as at the first inner update with `eps = 0`, the gradient is that of the ratio.
    """
    ratio = ratio_of(log_ratio)
    unclipped, bounded = ratio * advantage, jnp.clip(ratio, 1 - eps_low, 1 + eps_high) * advantage
    clipped = unclipped > bounded
    return -jnp.where(clipped, jax.lax.stop_gradient(bounded), unclipped), clipped.astype(jnp.float32)


def ratio_metrics(log_ratio: Array, clipped: Array) -> dict[str, Array]:
    """Returns the metrics of a ratio of policies: where it is clipped, the ratio, and the size of its logarithm."""
    return {"clipped": clipped, "ratio": ratio_of(log_ratio), "log_ratio": jnp.abs(log_ratio)}


def k1(new: Array, ref: Array) -> Array:
    """Computes `d = l_theta - l_ref`; its gradient includes the score-function term `d grad(l_theta)` of E[d]."""
    difference = new - ref
    return difference + jax.lax.stop_gradient(difference) * (new - jax.lax.stop_gradient(new))


def k2(new: Array, ref: Array) -> Array:
    """Computes `d^2 / 2` with `d = l_theta - l_ref`."""
    return 0.5 * (new - ref) ** 2


def k3(new: Array, ref: Array) -> Array:
    """Computes `exp(-d) + d - 1` with `d = l_theta - l_ref`."""
    difference = new - ref
    return ratio_of(-difference) + difference - 1


KL = {"k1": k1, "k2": k2, "k3": k3}


def mean_weights(mask: Float[Array, "B L"]) -> Float[Array, "B L"]:
    """Returns the weights of a mean over the tokens of the batch where `mask` is 1; the denominator is at least 1."""
    return mask / jnp.maximum(jnp.sum(mask), 1.0)


def group_softmax(values: Float[Array, " B"], group_size: int) -> Float[Array, " B"]:
    """Computes the softmax over the rows of each group."""
    return jax.nn.softmax(values.reshape(-1, group_size), axis=1).reshape(-1)


def effective_share(weights: Float[Array, " B"], group_size: int) -> Float[Array, " B"]:
    """Divides the effective sample size `1 / sum w^2` of each group's weights by the size of the group.

    The result is 1 for uniform weights and 1/G where a single row has all the weight.
    """
    groups = weights.reshape(-1, group_size)
    share = 1 / (jnp.sum(groups**2, axis=1, keepdims=True) * group_size)
    return jnp.broadcast_to(share, groups.shape).reshape(-1)
