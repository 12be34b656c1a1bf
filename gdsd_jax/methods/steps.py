"""Chooses steps of a rollout, and builds views of the states before them.

B rows, M views, L completion tokens, T = P + L tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gdsd_jax.diffusion import masking
from gdsd_jax.diffusion.trajectory import StepViews, step_views
from gdsd_jax.methods.method import Batch
from gdsd_jax.runtime.errors import UserError

# The step of a view that masks nothing.
NONE = -1


def of_batch(batch: Batch, method: str, *fields: str) -> Int[Array, "B L"]:
    """Returns the commit steps of a batch.

    Raises:
      UserError: the batch lacks them, the settings of its sampler, or one of the further `fields`.
    """
    for name in ("commit_step", "sampler", *fields):
        if getattr(batch, name) is None:
            argument = {"log_prob": "rollout_log_prob", "entropy": "rollout_entropy"}.get(name, name)
            raise UserError(f"{method} needs the rollout's {name}, which is absent: give loss_on_views {argument}")
    return batch.commit_step


def sampled(batch: Batch) -> Bool[Array, "B L"]:
    """Returns where a step wrote the token; `stop_at_eos`, for example, fills tails with EOS that no step wrote."""
    if batch.commit_step is None or batch.sampler is None:
        return jnp.ones(batch.completion_mask.shape, bool)
    return batch.commit_step < batch.step_limit


def masks_before(batch: Batch, step: Int[Array, "M B"]) -> Bool[Array, "M B T"]:
    """Returns the tokens that are masked before each step; none if the step is `NONE` or committed nothing."""
    commits = batch.commit_step
    known = jnp.any(commits == step[..., None], axis=-1, keepdims=True)
    return masking.behind_prompt(known & (commits >= step[..., None]), batch.prompt_length)


def step_of(masked: Bool[Array, "M B T"], batch: Batch) -> Int[Array, "M B"]:
    """Returns the step that a mask precedes: the first that committed a masked token; `NONE` if nothing is masked."""
    completion = masked[:, :, batch.prompt_length :]
    first = jnp.min(jnp.where(completion, batch.commit_step, jnp.iinfo(jnp.int32).max), axis=-1)
    return jnp.where(jnp.any(completion, axis=-1), first, NONE)


def views_before(masked: Bool[Array, "M B T"], batch: Batch, *, at_once: int) -> StepViews:
    """Builds views of the given states; the tokens that their steps commit have the weight 1.

    Args:
      at_once: views that share a forward pass.
    """
    views = step_views(batch.commit_step, step_of(masked, batch), batch.prompt_length, batch.sampler, at_once=at_once)
    return views.replace(masked=masked)


def distinct(commit_step: Int[Array, "B L"], limit: int) -> tuple[Int[Array, "B L"], Int[Array, " B"]]:
    """Returns the steps of each row that committed something, in order and padded with `NONE`; and their number.

    Args:
      limit: the `commit_step` of positions that no step wrote.
    """
    order = jnp.sort(commit_step, axis=1)
    new = jnp.pad(order[:, 1:] != order[:, :-1], [(0, 0), (1, 0)], constant_values=True) & (order < limit)
    place = jnp.argsort(~new, axis=1, stable=True)
    count = jnp.sum(new, axis=1)
    steps = jnp.take_along_axis(order, place, axis=1)
    return jnp.where(jnp.arange(order.shape[1]) < count[:, None], steps, NONE), count


def by_step(values: Float[Array, "B L"], batch: Batch, steps: int) -> tuple[Float[Array, "B steps"], Array]:
    """Sums `values` over the tokens that each of the first `steps` steps commits, and counts these tokens."""
    commits = (batch.commit_step[:, None, :] == jnp.arange(steps)[:, None]).astype(values.dtype)
    return jnp.sum(jnp.where(commits > 0, values[:, None], 0.0), axis=-1), jnp.sum(commits, axis=-1)


def stratified_uniform(key: Array, rows: int, draws: int) -> Float[Array, "B M"]:
    """Draws one number from each of `rows x draws` equal parts of [0, 1), in random order."""
    noise_key, order_key = jax.random.split(key)
    parts = jnp.arange(rows * draws) + jax.random.uniform(noise_key, (rows * draws,))
    return jax.random.permutation(order_key, parts / (rows * draws)).reshape(rows, draws)
