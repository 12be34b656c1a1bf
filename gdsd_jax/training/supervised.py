"""Computes the loss of supervised training: in a compiled update, and on held-out demonstrations.

Each text draws `t = (1 - 1e-3) u + 1e-3` with `u ~ U(0, 1)`, and each of its completion tokens is masked with
probability `t`. The loss is the sum over masked tokens of their cross-entropy divided by `t`, over the number of
completion tokens (LLaDA, arXiv 2502.09992, Eq. 5).

B rows, T tokens, L completion tokens; in packed rows every token is read, so that L is T.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from gdsd_jax.config import TrainConfig
from gdsd_jax.denoiser import DenoiserConfig, LoRA, hidden_states
from gdsd_jax.diffusion import masking
from gdsd_jax.diffusion.scoring import Views, read_tokens, read_views
from gdsd_jax.runtime.streams import Stream, stream_key, stream_of_seed
from gdsd_jax.runtime.transfer import fetch, put
from gdsd_jax.training.arrange import micro_batches
from gdsd_jax.training.demonstrations import Encoded, Packed, rows_of
from gdsd_jax.training.setup import Setup
from gdsd_jax.training.state import TrainState, policy

MIN_RATIO = 1e-3


def completion_tokens(batch: Encoded | Packed) -> Bool[Array, "B L"]:
    """Returns which tokens are trained on: all tokens of completions, or the answers of packed rows."""
    if isinstance(batch, Packed):
        return batch.answers
    rows, total = batch.tokens.shape
    return jnp.ones((rows, total - batch.prompt_mask.shape[1]), bool)


def draw_views(key: jax.Array, batch: Encoded | Packed) -> Views:
    """Masks completions at ratios that are spread evenly over the texts, with the weights of a loss per token."""
    trained, prompt_length = completion_tokens(batch), 0
    rows, length = trained.shape
    ratio_key, mask_key = jax.random.split(key)
    # Ratios with one random offset are uniform for each text, and make a batch far less noisy than independent ones.
    if isinstance(batch, Packed):
        in_row = jnp.max(batch.texts, axis=1)
        number = (jnp.cumsum(in_row) - in_row)[:, None] + jnp.maximum(batch.texts - 1, 0)
        share, count = number / jnp.sum(in_row), jnp.sum(trained)
    else:
        share, count = (jnp.arange(rows) / rows)[:, None], rows * length
        prompt_length = batch.prompt_mask.shape[1]
    u = (jax.random.uniform(ratio_key) + share) % 1.0
    t = (1 - MIN_RATIO) * u + MIN_RATIO
    masked = masking.bernoulli(mask_key, t, rows, length) & trained
    weights = (masked / t / count)[None]
    return Views(masking.behind_prompt(masked, prompt_length)[None], weights, ((0,),))


def token_log_probs(
    config: DenoiserConfig,
    base: Any,
    lora: LoRA | None,
    batch: Encoded | Packed,
    views: Views,
    *,
    chunk: int,
    dropout_key: jax.Array | None = None,
) -> Float[Array, "1 B L"]:
    """Returns the log-probabilities of the clean tokens in their masked view."""
    if isinstance(batch, Encoded):
        return read_views(
            config, base, lora, batch.tokens, views, ("log_prob",),
            prompt_mask=batch.prompt_mask, dropout_key=dropout_key, chunk=chunk,
        )["log_prob"]  # fmt: skip
    noisy = jnp.where(views.masked[0], config.mask_token_id, batch.tokens)
    hidden = hidden_states(config, base, lora, noisy, texts=batch.texts, dropout_key=dropout_key)
    return read_tokens(config, base, hidden[None], batch.tokens[None], ("log_prob",), chunk=chunk)["log_prob"]


def make_sft_update(
    config: DenoiserConfig,
    optimizer: optax.GradientTransformation,
    chunk: int,
    shardings: TrainState,
    microbatch_rows: int,
) -> Callable[[TrainState, Any, Encoded | Packed], tuple[TrainState, dict]]:
    """Compiles `update(state, base, batch) -> (state, metrics)`, which donates the state.

    Args:
      chunk: vocabulary entries whose logits exist at one time.
      shardings: the placement of the new state.
    """

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def update(state: TrainState, base: Any, batch: Encoded | Packed) -> tuple[TrainState, dict]:
        views = draw_views(stream_key(state.key, Stream.SFT_MASKS, state.updates), batch)

        def piece_loss(params: Any, index: jax.Array, batch: Encoded | Packed, views: Views) -> jax.Array:
            key = jax.random.fold_in(stream_key(state.key, Stream.SFT_DROPOUT, state.updates), index)
            own = policy(base, params)
            return -jnp.sum(views.weights * token_log_probs(config, *own, batch, views, chunk=chunk, dropout_key=key))

        def add(carry: tuple, piece: tuple) -> tuple[tuple, None]:
            found = jax.value_and_grad(piece_loss)(state.params, *piece)
            return jax.tree.map(jnp.add, carry, found), None

        pieces = (
            jnp.arange(len(batch.tokens) // microbatch_rows),
            micro_batches(batch, microbatch_rows),
            micro_batches(views, microbatch_rows, axis=1),
        )
        zeros = (jnp.zeros(()), optax.tree.zeros_like(state.params))
        (loss, gradient), _ = jax.lax.scan(add, zeros, pieces)
        changes, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, changes)
        state = state.replace(params=params, opt_state=opt_state, updates=state.updates + 1)
        return state, {"loss": loss, "grad/norm": optax.tree.norm(gradient)}

    return update


def make_held_out_loss(
    config: TrainConfig, setup: Setup, apart: Encoded | Packed, rows: int, frozen: Any
) -> Callable[[Any], float]:
    """Returns a function from trained parameters to the loss on held-out demonstrations, always on the same masks.

    Args:
      apart: the held-out demonstrations.
      rows: the number of rows in a batch.
      frozen: the base if an adapter is trained on it, or None if the base itself is trained.
    """
    count = len(apart.tokens)
    key = stream_of_seed(config.sft.seed, Stream.SFT_HELD_OUT)

    @jax.jit
    def batch_loss(
        params: Any, base: Any, key: jax.Array, batch: Encoded | Packed, real: jax.Array, number: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        views, trained = draw_views(jax.random.fold_in(key, number[0]), batch), completion_tokens(batch)
        own = policy(base, params)
        log_probs = token_log_probs(setup.model, *own, batch, views, chunk=config.model.vocab_chunk)
        total = -jnp.sum(views.weights * log_probs * real[:, None]) * jnp.sum(trained)
        return total, jnp.sum(trained * real[:, None])

    def loss(params: Any) -> float:
        total = tokens = 0.0
        for first in range(0, count, rows):
            # The last batch is filled up with copies of the last row, which do not count.
            chosen = np.arange(first, first + rows)
            real, number = (chosen < count).astype(np.float32), np.full(rows, first, np.int32)
            batch = put((rows_of(apart, np.minimum(chosen, count - 1)), real, number))
            summed, read = fetch(batch_loss(params, frozen, key, *batch))
            total, tokens = total + float(summed), tokens + float(read)
        return total / tokens

    return loss
