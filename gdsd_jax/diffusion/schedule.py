"""The probability that the steps of a sampler commit as many tokens as they did.

B rows, L completion tokens.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gdsd_jax.diffusion.remasking import STRATEGIES, SamplerConfig, scheduled_count, time_shares


def schedule_log_prob(commit_step: Int[Array, "B L"], settings: SamplerConfig) -> Float[Array, "B steps"]:
    """Computes the log-probability, in nats, of the number of tokens that each step commits.

    Under a schedule it is 0 if the number is the scheduled one, else -inf. With `origin` it is the log-probability of
    the step's coins. With a threshold or a factor there is no schedule, and it is 0.
    """
    limit, per_block = settings.step_limit, settings.steps_per_block
    step = jnp.arange(limit)
    if settings.threshold is not None or settings.factor is not None:
        return jnp.zeros((commit_step.shape[0], limit), jnp.float32)
    block, inside = step // per_block, step % per_block
    in_block = jnp.arange(settings.completion_length) // settings.block_length == block[:, None]
    now = commit_step[:, None, :] == step[:, None]
    masked = jnp.sum(in_block & (commit_step[:, None, :] >= step[:, None]), axis=-1)
    count = jnp.sum(now & in_block, axis=-1)
    last, strategy = inside == per_block - 1, STRATEGIES[settings.strategy]
    if strategy.independent:
        share = time_shares(settings)[inside]
        coins = count * jnp.log(share) + (masked - count) * jnp.log1p(-share)
        log_prob = jnp.where(last, jnp.where(count == masked, 0.0, -jnp.inf), coins)
    else:
        expected = scheduled_count(settings, masked.astype(jnp.float32), inside)
        if strategy.timed:
            expected = jnp.where(last, masked, expected)
        log_prob = jnp.where(count == jnp.minimum(expected, masked), 0.0, -jnp.inf)
    # With `stop_at_eos`, the sampler stops after the step that finishes the last row.
    written = jnp.where(commit_step < limit, commit_step, -1)
    taken = step <= jnp.max(written) if settings.stop_at_eos else step >= 0
    astray = jnp.any(now & ~in_block, axis=-1)
    return jnp.where(taken & (block < settings.blocks), jnp.where(astray, -jnp.inf, log_prob), 0.0)
