"""Computes the exact log-probability of a rollout: of every step committing the tokens and positions that it did.

    log pi(trajectory) = sum_s log P(U_s, y_U | state before s)

Each factor takes one forward pass (`gdsd_jax.diffusion.order`), for all settings of the sampler that `check_defined`
accepts. The result is the probability of the completion together with the order in which it was written. The
probability of the completion alone would be a sum over orders.

K views, B rows, L completion tokens, T = P + L tokens, S positions of a block, G passes per view, D hidden size,
V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gdsd_jax.denoiser import DenoiserConfig, LoRA, head_weights, hidden_states_at, noisy_states_at, precision_of
from gdsd_jax.diffusion import masking
from gdsd_jax.diffusion.blocks import step_limit, tail_length
from gdsd_jax.diffusion.order import NEVER, Walk, drawn_log_prob, proposal, step_log_prob
from gdsd_jax.diffusion.proposals import banned_tokens
from gdsd_jax.diffusion.remasking import STRATEGIES, SamplerConfig
from gdsd_jax.diffusion.sampler import Rollout, passes
from gdsd_jax.diffusion.schedule import schedule_log_prob
from gdsd_jax.diffusion.scoring import DEFAULT_CHUNK, Views, chunk_logits, over_chunks
from gdsd_jax.runtime.errors import UserError


@flax.struct.dataclass
class StepViews(Views):
    """Holds the states of a rollout before some of its steps; each state is a view.

    Its reads are "step_log_prob", "proposal_log_prob", "log_prob", "entropy" and "entropy_value". "step_log_prob",
    summed over positions, is the log-probability of the step. "proposal_log_prob" is the log-probability with which a
    committed token is drawn, with temperature and cuts. The other reads are of the distribution without temperature
    and cuts. All are 0 at positions that the step does not commit, except that "step_log_prob" also has terms for
    positions that the step leaves masked.

    Attributes:
      step: `[K, B]` int32, the steps. All reads of a step that commits nothing are 0.
      commit_step: `[1, B, L]` int32.
      sampler: static, the settings of the sampler.
      at_once: static, the number of views that share a pass; None: all. A gradient recomputes one pass after another.
    """

    step: Any = None
    commit_step: Any = None
    sampler: SamplerConfig | None = flax.struct.field(pytree_node=False, default=None)
    at_once: int | None = flax.struct.field(pytree_node=False, default=None)

    def read(self, *arguments: Any, **options: Any) -> dict:
        return _read_steps(*arguments, **options)

    def predicted(self) -> Array:
        """Returns where the step of a view commits a token, `[K, B, L]` bool; only there the token is read."""
        return self.commit_step == self.step[..., None]


def step_views(
    commit_step: Int[Array, "B L"],
    step: Int[Array, "K B"],
    prompt_length: int,
    sampler: SamplerConfig,
    *,
    at_once: int | None = None,
) -> StepViews:
    """Returns views of the states before each `step`; positions that the step commits have the weight 1, others 0."""
    masked = masking.behind_prompt(commit_step >= step[..., None], prompt_length)
    weights = (commit_step == step[..., None]).astype(jnp.float32)
    sources = tuple((index,) for index in range(step.shape[0]))
    return StepViews(masked, weights, sources, step, commit_step[None], sampler, at_once)


def trajectory_log_prob(
    config: DenoiserConfig,
    base: Any,
    lora: LoRA | None,
    rollout: Rollout,
    prompt_mask: Array | np.ndarray | None,
    settings: SamplerConfig,
    *,
    chunk: int = DEFAULT_CHUNK,
    steps_at_once: int = 1,
) -> Float[Array, "B steps"]:
    """Computes the log-probability of each step of a rollout, in nats.

    The sum over steps is the log-probability of the completion and its commit steps together. Steps that were not taken
    or had nothing to commit have the log-probability 0, and steps that the policy could not have taken have -inf.
    Rounding can also cause -inf: if two scores differ only by rounding, either candidate may rank first, and a token
    close to a cut may be cut. The result is differentiable in `base` and `lora`. Each step takes one forward pass, or
    none if it commits nothing in any row.

    Args:
      rollout: the result of `sample` with these settings, with all rows of the batch, because all rows together decide
        when a rollout stops.
      prompt_mask: `[B, P]`, True on real tokens, as for `sample`.
      chunk: vocabulary entries whose logits exist at one time.
      steps_at_once: steps that share a forward pass; a gradient recomputes one pass after another.

    Returns:
      `[B, blocks.step_limit(config, settings)]`, that is `settings.steps` unless blocks may take more.

    Raises:
      UserError: the likelihood is not defined or implemented under these settings, or the rollout does not fit them.
    """
    check_defined(settings, config)
    expected = (rollout.tokens.shape[0], settings.completion_length)
    if rollout.commit_step.shape != expected:
        raise UserError(
            f"rollout.commit_step has shape {rollout.commit_step.shape}, the settings expect {expected}; "
            "pass the SamplerConfig that the rollout was sampled with"
        )
    return compiled_log_prob(config, base, lora, rollout, prompt_mask, settings, chunk, steps_at_once)


def check_defined(settings: SamplerConfig, config: DenoiserConfig | None = None) -> None:
    """Raises UserError if the likelihood of a rollout is not defined or not implemented under these settings.

    Without `config`, the denoiser is assumed to have full attention.
    """
    blocks = config is not None and config.block_size is not None
    exact = settings.cache == "none" or settings.refresh_every == 1
    for wrong, message in (
        (
            STRATEGIES[settings.strategy].plan is not None
            or any((settings.floor, settings.grow, settings.lead, settings.end_think)),
            "no exact log-probability is computed for the strategies mdlm and mdlm_cosine, or with floor, grow, "
            "lead or end_think; set config.sampler.strategy to low_confidence and the others to False or ()",
        ),
        (
            STRATEGIES[settings.strategy].independent
            and bool(settings.suppress_confidence)
            and settings.threshold is None
            and settings.factor is None,
            f"with strategy {settings.strategy!r} and suppress_confidence a step that commits nothing depends on the "
            "policy too, and such steps are not read; set config.sampler.suppress_confidence=()",
        ),
        (
            blocks and STRATEGIES[settings.strategy].independent,
            "under block-causal attention the coins of origin are not counted; set config.sampler.strategy to another",
        ),
        (
            not settings.forbid_mask,
            "forbid_mask=False lets a position be written again, and only the last write of each is recorded; "
            "set config.sampler.forbid_mask=True",
        ),
        (
            settings.temperature == 0,
            "temperature 0 draws nothing, so that a completion has probability 1 or 0; set config.sampler.temperature "
            "above 0",
        ),
        (
            not exact,
            f"cache={settings.cache!r} decodes from keys and values of earlier steps, which are not recorded; set "
            "config.sampler.cache='none', or refresh_every=1",
        ),
    ):
        if wrong:
            raise UserError(f"the likelihood of a rollout is not defined here: {message}")


@functools.partial(jax.jit, static_argnames=("config", "settings", "chunk", "steps_at_once"))
def compiled_log_prob(
    config: DenoiserConfig,
    base: Any,
    lora: LoRA | None,
    rollout: Rollout,
    prompt_mask: Array | np.ndarray | None,
    settings: SamplerConfig,
    chunk: int,
    steps_at_once: int,
) -> Array:
    """Computes what `trajectory_log_prob` does, without its checks; this is the jitted program."""
    rows = rollout.commit_step.shape[0]
    prompt_length = rollout.tokens.shape[1] - settings.completion_length
    limit = step_limit(config, settings)
    steps = jnp.broadcast_to(jnp.arange(limit)[:, None], (limit, rows))
    views = step_views(rollout.commit_step, steps, prompt_length, settings, at_once=steps_at_once)
    options = {"prompt_mask": prompt_mask, "dropout_key": None, "chunk": chunk}
    read = _read_steps(config, base, lora, rollout.tokens, views, ("step_log_prob",), **options)
    log_prob = jnp.sum(read["step_log_prob"], axis=-1).T
    if config.block_size is not None:
        # The strategies that are defined under block-causal attention do not draw their number of tokens. It could not
        # be checked either: rows leave a block together, so a step's number does not tell its place in a block.
        return log_prob
    return log_prob + schedule_log_prob(rollout.commit_step, settings)


def _read_steps(
    config: DenoiserConfig,
    base: Any,
    lora: LoRA | None,
    tokens: Int[Array, "B T"],
    views: StepViews,
    reads: tuple,
    *,
    prompt_mask: Array | None,
    dropout_key: Array | None,
    chunk: int,
) -> dict:
    """Reads `StepViews` as `read_views` does; only the active block of each step is read.

    Raises:
      UserError: the sampler hides pads that it wrote, which the views do not record.
    """
    if views.sampler.hide_pads and config.block_size is not None:
        raise UserError("a likelihood attends to the pads that hide_pads hides: set config.sampler.hide_pads=False")
    count, at_once = views.step.shape[0], views.at_once or views.step.shape[0]
    size = next(n for n in range(min(at_once, count), 0, -1) if count % n == 0)
    read = functools.partial(_read_some, config, base, lora, tokens, views, reads, prompt_mask, chunk)
    if size == count:
        return read(views.masked, views.step, dropout_key)

    def some(piece: tuple) -> tuple:
        masked, step, index = piece
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        found = jax.eval_shape(read, masked, step, key)
        nothing = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tuple(found[name] for name in reads))  # noqa: E731
        full = lambda: tuple(read(masked, step, key)[name] for name in reads)  # noqa: E731
        return jax.lax.cond(jnp.any(views.commit_step == step[..., None]), full, nothing)

    cut = lambda x: x.reshape(count // size, size, *x.shape[1:])  # noqa: E731
    pieces = cut(views.masked), cut(views.step), jnp.arange(count // size)
    found = jax.lax.map(jax.checkpoint(some), pieces)
    return {name: value.reshape(count, *value.shape[2:]) for name, value in zip(reads, found, strict=True)}


def _read_some(
    config: DenoiserConfig,
    base: Any,
    lora: LoRA | None,
    tokens: Array,
    views: StepViews,
    reads: tuple,
    prompt_mask: Array | None,
    chunk: int,
    masked: Array,
    step: Array,
    dropout_key: Array | None,
) -> dict:
    """Computes the reads, `[c, B, L]`, of the states `masked` [c, B, T] before `step` [c, B], in one forward pass."""
    settings, length = views.sampler, views.commit_step.shape[-1]
    (count, rows, total), size = masked.shape, settings.block_length
    commits = views.commit_step == step[..., None]
    tail = tail_length(config, prompt_mask, rows, total - length)
    start = (jnp.argmax(commits, axis=-1) + tail) // size * size - tail
    # The first block of a row may begin in the prompt, and the last block may end after the completion.
    place = start[..., None] + jnp.arange(size)
    inside, place = (place >= 0) & (place < length), jnp.clip(place, 0, length - 1)
    at_block = lambda x: jnp.take_along_axis(jnp.broadcast_to(x, (count, rows, length)), place, axis=-1)  # noqa: E731
    committed, target = inside & at_block(commits), at_block(tokens[:, total - length :])
    # A row that commits nothing has no active block.
    eligible = inside & at_block(masked[:, :, total - length :]) & jnp.any(commits, axis=-1, keepdims=True)

    # The views of a row are adjacent, and with guidance so are the two passes of a view.
    noisy = jnp.moveaxis(jnp.where(masked, config.mask_token_id, tokens), 0, 1).reshape(rows * count, total)
    real = None if prompt_mask is None else jnp.repeat(prompt_mask.astype(bool), count, axis=0)
    noisy, real = passes(config, settings, noisy, real)
    guided = noisy.shape[0] // (rows * count)
    at = jnp.repeat(jnp.moveaxis(place, 0, 1).reshape(rows * count, size), guided, axis=0)
    if config.block_size is None:
        read = hidden_states_at(config, base, lora, noisy, prompt_mask=real, dropout_key=dropout_key)
    else:
        clean = jnp.repeat(tokens, count * guided, axis=0)
        given = {"prompt_mask": real, "dropout_key": dropout_key}
        read = noisy_states_at(config, base, lora, clean, noisy, length=length, **given)
    hidden = read(total - length + at).reshape(rows, count, guided, size, -1)
    walk = vocabulary_walk(config, base, jnp.transpose(hidden, (2, 1, 0, 3, 4)), settings, chunk)
    values = step_reads(walk, target, committed, eligible, settings, config.vocab_size, reads)
    back = jnp.arange(length) - start[..., None]
    spread = lambda x: jnp.take_along_axis(x, jnp.clip(back, 0, size - 1), axis=-1)  # noqa: E731
    return {name: jnp.where((back >= 0) & (back < size), spread(x), 0.0) for name, x in values.items()}


def step_reads(
    walk: Walk,
    target: Array,
    committed: Array,
    eligible: Array,
    settings: SamplerConfig,
    vocab_size: int,
    reads: tuple,
    dtype: Any = jnp.float32,
) -> dict:
    """Computes the `reads` of `StepViews`, each `[..., S]`, from a walk (see `gdsd_jax.diffusion.order`)."""
    out = {}
    if "step_log_prob" in reads:
        arguments = (walk, target, committed, eligible, settings, vocab_size, dtype)
        out["step_log_prob"], found = step_log_prob(*arguments)
    else:
        found = proposal(walk, target, settings, vocab_size, dtype)
    at_committed = lambda x: jnp.where(committed, x, 0.0)  # noqa: E731
    if "proposal_log_prob" in reads:
        out["proposal_log_prob"] = at_committed(drawn_log_prob(found, settings))
    if "log_prob" in reads:
        out["log_prob"] = at_committed(found.logit - found.plain)
    if {"entropy", "entropy_value"} & set(reads):

        def step(total: Array, z: Array, _: Array) -> Array:
            difference = z - found.plain[..., None]
            return total - jnp.sum(jnp.where(z > NEVER / 2, jnp.exp(difference) * difference, 0.0), axis=-1)

        entropy = at_committed(walk(step, jnp.zeros(target.shape, dtype)))
        out |= {"entropy": entropy, "entropy_value": jax.lax.stop_gradient(entropy)}
    return {name: out[name] for name in reads}


def vocabulary_walk(
    config: DenoiserConfig, base: Any, hidden: Float[Array, "G K B S D"], settings: SamplerConfig, chunk: int
) -> Walk:
    """Returns a walk over the logits of hidden states; banned tokens have the logit `NEVER`.

    The backward pass recomputes the logits of each chunk.

    Args:
      hidden: `[G, K, B, S, D]`, the conditional states and, with guidance (G = 2), the unconditional ones.
    """
    head = head_weights(config, base)
    precision = precision_of(config)
    banned = jnp.asarray(banned_tokens(config, settings), jnp.int32)
    wide = hidden.astype(jnp.float32)

    def walk(step: Any, start: Any) -> Any:
        def one(carry: Any, rows: Array, ids: Array) -> Any:
            z, *others = (chunk_logits(h, rows, hidden.dtype, precision) for h in wide)
            for unconditional in others:
                z = unconditional + (settings.cfg_scale + 1) * (z - unconditional)
            return step(carry, jnp.where(jnp.isin(ids, banned), NEVER, z), ids)

        return over_chunks(one, start, head, chunk)

    return walk
