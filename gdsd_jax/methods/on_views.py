"""Computes a method's objective on given masks, for parity tests and for experiments by hand."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from gdsd_jax.denoiser import DenoiserConfig, LoRA
from gdsd_jax.diffusion import SamplerConfig
from gdsd_jax.diffusion.scoring import DEFAULT_CHUNK, read_views
from gdsd_jax.methods.method import Batch, Scores
from gdsd_jax.methods.registry import build
from gdsd_jax.runtime.errors import UserError


def loss_on_views(
    name: str,
    config: DenoiserConfig,
    base: Any,
    lora: LoRA | None,
    *,
    prompts: ArrayLike,
    completions: ArrayLike,
    masked: ArrayLike | None,
    advantages: ArrayLike | None = None,
    old: ArrayLike | None = None,
    ref: ArrayLike | None = None,
    prompt_mask: ArrayLike | None = None,
    completion_mask: ArrayLike | None = None,
    rewards: ArrayLike | None = None,
    group_size: int | None = None,
    commit_step: ArrayLike | None = None,
    confidence: ArrayLike | None = None,
    rollout_log_prob: ArrayLike | None = None,
    rollout_entropy: ArrayLike | None = None,
    step_rewards: ArrayLike | None = None,
    extras: Any = None,
    sampler: SamplerConfig | None = None,
    eos_token_id: int | None = None,
    chunk: int = DEFAULT_CHUNK,
    **settings: Any,
) -> tuple[Float[Array, ""], Array]:
    """Computes a method's objective on given masks; it is differentiable in `base` and `lora`.

    Args:
      prompts, completions: `[B, P]` and `[B, L]` ids.
      masked: `[M, B, P+L]` bool, the masks of the views; the method itself adds complements, and `coupled_grpo` its
        fully masked view. None suffices for methods that derive their masks, such as `tracerl` from `commit_step`.
      advantages: `[B]`; None: the method computes its own from `rewards` in groups of `group_size`.
      old, ref: scores of the old and the reference policy in the method's own shape: `[B, M]` for `gdsd` and
        `gdsd_tlc`, `[B]` for `espo`, `spg` and `dmpo`, `[B, L]` for token-level methods. old=None: the stop-gradient of
        the current scores; ref=None: no KL.
      prompt_mask: True on real prompt tokens; None: every token is attended to, including pads.
      completion_mask: `[B, L]`, 1 through the first EOS; None: all ones.
      rewards: `[B]`.
      group_size: rows per group; None: one group.
      commit_step: `[B, L]`, the denoising step that committed each token.
      confidence, rollout_log_prob, rollout_entropy, step_rewards, sampler, eos_token_id: further fields of `Batch`.
      extras: the parameters that the method trains beside the policy, if it has any.
      chunk: vocabulary entries whose logits exist at one time.
      **settings: fields of the method's settings class.

    Returns:
      The loss, a float32 scalar, and `Scores.guided` of the current policy, rows first.

    Raises:
      UserError: an argument that the method needs is missing or has another shape, or a setting is not valid.
    """
    method = build(name, **settings)
    rows, length = jnp.shape(completions)
    total = jnp.shape(prompts)[1] + length
    if masked is not None and jnp.shape(masked)[1:] != (rows, total):
        raise UserError(f"masked has shape {jnp.shape(masked)}: give loss_on_views [M, {rows}, {total}] for this batch")
    if advantages is None and rewards is None:
        raise UserError("neither advantages nor rewards are given: give loss_on_views one of them")
    array = lambda x, dtype=jnp.float32: None if x is None else jnp.asarray(x, dtype)  # noqa: E731
    batch = Batch(
        tokens=jnp.concatenate([jnp.asarray(prompts), jnp.asarray(completions)], axis=1),
        prompt_mask=array(prompt_mask, bool),
        completion_mask=jnp.ones((rows, length)) if completion_mask is None else array(completion_mask),
        rewards=array(rewards),
        advantages=array(advantages),
        commit_step=array(commit_step, jnp.int32),
        confidence=array(confidence),
        log_prob=array(rollout_log_prob),
        entropy=array(rollout_entropy),
        step_rewards=array(step_rewards),
        group_size=group_size or rows,
        sampler=sampler,
        eos_token_id=eos_token_id,
    )
    try:
        views = method.views(array(masked, bool), batch)
    except (AttributeError, TypeError) as error:
        if masked is not None:
            raise
        raise UserError(f"method {name!r} does not derive its masks: give loss_on_views masked") from error
    reads = read_views(
        config, base, lora, batch.tokens, views, method.reads, prompt_mask=batch.prompt_mask, chunk=chunk
    )
    new = method.scores(reads, views, extras)
    compared = {"old": (old, new.guided)} if method.old != "unused" else {}
    compared |= {"ref": (ref, new.normalised)} if method.needs_reference else {}
    for argument, (given, own) in compared.items():
        if given is not None and jnp.shape(given) != own.shape:
            raise UserError(
                f"{argument} has shape {jnp.shape(given)}: give method {name!r} scores of shape {own.shape}"
            )
    old_scores = None if old is None else Scores(array(old), array(old))
    if old is None and method.old in ("always", "own_masks"):
        old_scores = new
    ref_scores = None if ref is None else Scores(array(ref), array(ref))
    constants = method.constants(batch, old_scores, ref_scores, new)
    losses, _ = method.objective(new, constants)
    return jnp.sum(sum(losses.values())), new.guided
