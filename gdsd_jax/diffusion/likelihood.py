"""Scores given completions: estimates a bound on their likelihood, and tells whether greedy unmasking writes them.

Completions of different lengths share a program: each is left-aligned in the last `width` tokens and followed by pads.

B rows, T = P + width tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gdsd_jax.denoiser import DenoiserConfig, LoRA, hidden_states_at, logits_from_hidden
from gdsd_jax.diffusion import masking
from gdsd_jax.diffusion.scoring import DEFAULT_CHUNK, Views, read_views


@functools.partial(jax.jit, static_argnames=("config", "width", "draws", "chunk"))
def lower_bound(
    config: DenoiserConfig,
    base: Any,
    lora: LoRA | None,
    tokens: Int[Array, "B T"],
    real: Bool[Array, "B T"],
    key: Array,
    *,
    width: int,
    draws: int,
    chunk: int = DEFAULT_CHUNK,
) -> Float[Array, " B"]:
    """Estimates a lower bound of `log p(completion)`, in nats, from `draws` masked views.

    The bound is `E[n/l sum over l masked tokens of log p(token | unmasked tokens)]` for a completion of n tokens, with
    `l` uniform on 1..n. It is the evidence lower bound by which masked diffusion models are evaluated (arXiv
    2502.09992, the estimate of conditional likelihoods). The `l` of the views are spread evenly over 1..n. All rows
    share the same draws, so that the estimate of a row does not depend on its batch, and the difference between two
    completions of the same length is less noisy than either estimate.

    Args:
      tokens: left-padded prompts, and completions in the last `width` tokens.
      real: True on tokens, False on the pads before the prompt and after the completion.
      chunk: vocabulary entries whose logits exist at one time.
    """
    prompt_length = tokens.shape[1] - width
    valid = real[:, prompt_length:]
    length = jnp.sum(valid, axis=1)
    offset_key, noise_key = jax.random.split(key)
    offsets = (jax.random.uniform(offset_key) + jnp.arange(draws) / draws) % 1.0
    noise = jax.random.uniform(noise_key, (draws, width))

    def add(total: Array, draw: tuple[Array, Array]) -> tuple[Array, None]:
        offset, noise = draw
        count = jnp.minimum(1 + (offset * length).astype(jnp.int32), length)
        rank = jnp.argsort(jnp.argsort(jnp.where(valid, noise, 2.0), axis=1), axis=1)
        masked = rank < count[:, None]
        weights = masked * (length / count)[:, None]
        views = Views(masking.behind_prompt(masked, prompt_length)[None], weights[None], ((0,),))
        reads = read_views(config, base, lora, tokens, views, ("log_prob",), prompt_mask=real, chunk=chunk)
        return total + jnp.sum(weights * reads["log_prob"][0], axis=1), None

    total, _ = jax.lax.scan(add, jnp.zeros(tokens.shape[0]), (offsets, noise))
    return total / draws


@functools.partial(jax.jit, static_argnames=("config", "width"))
def is_greedy(
    config: DenoiserConfig,
    base: Any,
    lora: LoRA | None,
    tokens: Int[Array, "B T"],
    real: Bool[Array, "B T"],
    *,
    width: int,
) -> Bool[Array, " B"]:
    """Returns for each row whether greedy unmasking writes exactly its completion.

    Greedy unmasking commits one token per step, the most confident one, at temperature 0. Each step here commits the
    completion's own token instead of the model's choice, which makes no difference until the two differ for the first
    time. The arguments are those of `lower_bound`.
    """
    prompt_length = tokens.shape[1] - width
    target = tokens[:, prompt_length:]

    def step(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        masked, same = state
        noisy = jnp.where(masking.behind_prompt(masked, prompt_length), config.mask_token_id, tokens)
        hidden = hidden_states_at(config, base, lora, noisy, prompt_mask=real)(slice(prompt_length, tokens.shape[1]))
        logits = logits_from_hidden(config, base, hidden).at[..., config.mask_token_id].set(-jnp.inf)
        confidence = jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1)
        position = jnp.argmax(jnp.where(masked, confidence, -jnp.inf), axis=1)
        chosen = masked & (jnp.arange(width) == position[:, None])
        same &= jnp.all(~chosen | (jnp.argmax(logits, axis=-1) == target), axis=1)
        return masked & ~chosen, same

    start = real[:, prompt_length:], jnp.ones(tokens.shape[0], bool)
    return jax.lax.fori_loop(0, width, step, start)[1]
