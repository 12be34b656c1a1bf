"""The loss library. A method is one small value in one dictionary.

`METHODS[name]` holds a settings class and a function from settings to a `Method`; a user's own stands in a module of
theirs and is named `package.module:NAME`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from gdsd_jax.denoiser import DenoiserConfig, LoRA
from gdsd_jax.diffusion import SamplerConfig
from gdsd_jax.diffusion.scoring import DEFAULT_CHUNK, read_views
from gdsd_jax.errors import UserError
from gdsd_jax.methods import coupled_grpo, dmpo, espo, gdsd, grpo, spg, teacher, tracerl, unigrpo, wd1
from gdsd_jax.methods.common import Batch, Method, Scores
from gdsd_jax.methods.contract import check


class Recipe(NamedTuple):
    """A settings dataclass and what turns its values into a `Method`."""

    settings: type
    make: Callable[[Any], Method]


METHODS: dict[str, Recipe] = {
    "gdsd": Recipe(gdsd.Guidance, gdsd.make),
    "gdsd_tlc": Recipe(gdsd.Centred, gdsd.make),
    "gdsd_teacher": Recipe(teacher.Teacher, teacher.make),
    "espo": Recipe(espo.Settings, espo.make),
    "spg": Recipe(spg.Settings, spg.make),
    "diffu_grpo": Recipe(grpo.Settings, grpo.make),
    "wd1": Recipe(wd1.Settings, wd1.make),
    "coupled_grpo": Recipe(coupled_grpo.Settings, coupled_grpo.make),
    "unigrpo": Recipe(unigrpo.Settings, unigrpo.make),
    "dmpo": Recipe(dmpo.Settings, dmpo.make),
    "tracerl": Recipe(tracerl.Settings, tracerl.make),
}


def build(name: str, **settings: Any) -> Method:
    """The method of that name (or of `package.module:NAME`, a `Recipe`) with these settings.

    Raises:
      UserError: an unknown method or setting; the message lists the known ones.
    """
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            recipe = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(f"config.method {name!r} cannot be imported: {error}") from None
        if not isinstance(recipe, Recipe):
            raise UserError(f"config.method {name!r} is a {type(recipe).__name__}, not a gdsd_jax.methods.Recipe")
    elif name in METHODS:
        recipe = METHODS[name]
    else:
        names = ", ".join(METHODS)
        raise UserError(f"unknown method {name!r}: config.method is one of {names}, or package.module:NAME")
    known = {field.name for field in dataclasses.fields(recipe.settings)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise UserError(f"method {name!r} has no setting {', '.join(unknown)}: it knows {', '.join(sorted(known))}")
    return recipe.make(recipe.settings(**settings))


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
    sampler: SamplerConfig | None = None,
    chunk: int = DEFAULT_CHUNK,
    **settings: Any,
) -> tuple[Float[Array, ""], Array]:
    """A method's objective on masks given from outside, differentiable in `base` and `lora`.

    Args:
      prompts, completions: `[B, P]` and `[B, L]` ids.
      masked: `[M, B, P+L]` bool, the views' masks; complements, and the fully masked view of `coupled_grpo`, are the
        method's own business. None for `tracerl`, whose masks follow from `commit_step` (which wins where both stand).
      advantages: `[B]`; None: the method's own from `rewards` (`[B]`) in groups of `group_size` (None: one group).
      old, ref: scores of the old and the reference policy in the method's own shape: `[B, M]` for `gdsd` and
        `gdsd_tlc`, `[B]` for `espo`, `spg` and `dmpo`, `[B, L]` for methods of tokens. old=None: the stop-gradient of
        the current ones; ref=None: no KL.
      prompt_mask: True on real prompt tokens; None: everything is attended to, pads too.
      completion_mask: `[B, L]`, 1 through the first EOS; None: all ones.
      commit_step: `[B, L]`, the denoising step that committed each token.
      confidence, rollout_log_prob, rollout_entropy, step_rewards, sampler: further fields of `Batch`.
      chunk: vocabulary entries whose logits exist at one time.
      **settings: fields of the method's settings class.

    Returns:
      The loss, a float32 scalar, and the scores that the objective steers, rows first.
    """
    method = build(name, **settings)
    rows, length = completions.shape
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
    )
    views = method.views(array(masked, bool), batch)
    reads = read_views(
        config, base, lora, batch.tokens, views, method.reads, prompt_mask=batch.prompt_mask, chunk=chunk
    )
    new = method.score(reads, views)
    old_scores = None if old is None else Scores(array(old), array(old))
    if old is None and method.old in ("always", "own_masks"):
        old_scores = new
    ref_scores = None if ref is None else Scores(array(ref), array(ref))
    constants = method.constants(batch, old_scores, ref_scores, new)
    losses, _ = method.objective(new, constants)
    return jnp.sum(sum(losses.values())), new.guided


__all__ = ["METHODS", "Batch", "Method", "Recipe", "Scores", "build", "check", "loss_on_views"]
