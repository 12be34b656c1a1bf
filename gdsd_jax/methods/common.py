"""What methods share: the batch that they see, the contract that they fulfil, advantages, weights and clips.

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

from gdsd_jax.diffusion import masking
from gdsd_jax.diffusion.scoring import Views


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
      group_size: static, G.
    """

    tokens: Any
    prompt_mask: Any
    completion_mask: Any
    rewards: Any = None
    advantages: Any = None
    commit_step: Any = None
    confidence: Any = None
    group_size: int = flax.struct.field(pytree_node=False, default=1)

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
    """

    guided: Any
    normalised: Any


class Method(NamedTuple):
    """One objective, as functions. `gdsd_jax.methods.METHODS` lists them; the trainer never asks which it runs.

    reads: per-token quantities asked of the scorer, see `gdsd_jax.diffusion.scoring.read_tokens`.
    masks: `(key, batch) -> masked [M, B, T]`, drawn once per inner update and used by old, reference and new alike.
    views: `(masked, batch) -> Views`, adds what follows from the masks: coupled views and weights.
    score: `({read: [R, B, L]}, views) -> Scores`.
    prepare: `(batch, old Scores | None, ref Scores | None) -> constants`, a pytree of arrays with rows first.
    objective: `(new Scores, constants) -> (loss per row [B], {metric: [B]})`. Where the constants hold no old scores,
      old is the stop-gradient of new: the first inner update after a rollout, exactly.
    needs_reference: whether `prepare` uses the reference's scores.
    old: "unused" (no old policy), "ratio" (old only enters differences with new, so the first inner update needs no
      forward for it) or "always" (`prepare` couples rows through it).
    """

    reads: tuple
    masks: Callable
    views: Callable
    score: Callable
    prepare: Callable
    objective: Callable
    needs_reference: bool
    old: str = "ratio"


def leave_one_out(rewards: Float[Array, " B"], group_size: int, *, scale: bool = False) -> Float[Array, " B"]:
    """`A_i = r_i - mean of the other G - 1 rewards of its group`, over `std + 1e-4` (sample std) with `scale`."""
    groups = rewards.reshape(-1, group_size)
    others = (jnp.sum(groups, axis=1, keepdims=True) - groups) / (group_size - 1)
    advantages = groups - others
    if scale:
        advantages = advantages / (jnp.std(groups, axis=1, ddof=1, keepdims=True) + 1e-4)
    return advantages.reshape(-1)


def coupled_views(masked: Bool[Array, "M B T"], batch: Batch, *, weighted: bool) -> Views:
    """Each view with its complement, so that every completion token is predicted exactly once.

    The weights carry the half that makes the pair an average: 1/2 (plain), or with `weighted` the ELBO's
    `1/2 (L+1)/x` in the first view and `1/2 (L+1)/(L-x)` in the complement, `x` masked tokens (GDSD, ESPO).
    """
    pairs = jnp.stack([masked, masking.complement(masked, batch.prompt_length)], axis=1)
    completion = masked[:, :, batch.prompt_length :]
    weights = jnp.full(completion.shape, 0.5, jnp.float32)
    if weighted:
        length = batch.completion_length
        count = jnp.sum(completion, axis=-1, keepdims=True)
        in_view = jnp.where(completion, count, length - count)
        weights = 0.5 * (length + 1) / jnp.maximum(in_view, 1).astype(jnp.float32)
    sources = tuple((2 * m, 2 * m + 1) for m in range(masked.shape[0]))
    return Views(pairs.reshape(-1, *masked.shape[1:]), weights, sources)


def weighted_sum(values: Float[Array, "R B L"], views: Views) -> Float[Array, "B R"]:
    """`sum_k w_k l_k` of every row and read, in float32, rows first."""
    return jnp.sum(views.weights * values, axis=-1, dtype=jnp.float32).T


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
