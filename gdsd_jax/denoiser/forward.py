"""The denoiser as pure functions of tokens: hidden states at all or some positions, with or without a cache; logits.

If all layers are unrolled (`layer_unroll`), or the parameters are a tuple of layers, a plain loop runs the layers, and
the last layer computes only the positions that are read. Otherwise a scan runs them.

B rows, T tokens, D model size, V vocabulary, S positions that are read, W tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gdsd_jax.denoiser import attention, ops
from gdsd_jax.denoiser.config import DenoiserConfig
from gdsd_jax.denoiser.layout import Layout
from gdsd_jax.denoiser.lora import LoRA
from gdsd_jax.denoiser.model import Context, Denoiser, KeyValues, Layer, embed, head_weights, pick, precision_of, remat
from gdsd_jax.denoiser.prepared import unstacked
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.sharding import constrain, current

At = slice | Int[Array, " S"] | Int[Array, "B S"]
Read = Callable[[At | None], Float[Array, "B S D"]]


def real_tokens(prompt_mask: Array | None, batch: int, length: int) -> Array | None:
    """Returns a bool mask `[B, T]`, True on real tokens, from a mask of the first `P` (or all `T`) positions.

    Positions that the given mask does not cover are real. Without a mask the result is None.

    Raises:
      UserError: the mask is longer than the tokens.
    """
    if prompt_mask is None:
        return None
    missing = length - prompt_mask.shape[1]
    if missing < 0:
        raise UserError(f"prompt mask of length {prompt_mask.shape[1]} is longer than the {length} tokens")
    return jnp.concatenate([prompt_mask.astype(bool), jnp.ones((batch, missing), bool)], axis=1)


def rope_of(config: DenoiserConfig, length: int, layout: Layout | None = None) -> tuple[Array, Array]:
    """Returns the rotation tables of the columns of a pass, see `ops.rope_tables`."""
    columns = jnp.arange(length)
    positions = columns if layout is None else layout.place(columns)
    return ops.rope_tables(positions, config.head_dim, config.rope_theta)


def run(
    config: DenoiserConfig,
    base: Any,
    lora: LoRA | None,
    tokens: Array,
    context: Context,
    *,
    cache: Any = None,
    keep: bool = False,
    layout: Layout | None = None,
    dropout_key: Array | None = None,
) -> Callable[[At | None], tuple[Array, Any]]:
    """Runs the layers; `cache`, `keep` and `layout` are as in `Layer`.

    Returns:
      A function from positions in `tokens` (None: all) to their hidden states after the final norm, not yet
      target-aligned, and to the keys and values. Without `keep` these are None. With it they are those of the tokens
      `context.kept`, stacked, or a tuple with one entry per layer where layers are unrolled. Under cuDNN they are the
      whole `cache`, if there is one, with those of `tokens` written into it. If layers are unrolled, each call of the
      function runs the last layer, and only for these positions.
    """
    current()  # refuses a mesh that the parameters cannot lie on, before they are taken apart
    base, lora = unstacked(config, base, lora)
    adapter = None if lora is None else lora.replace(weights=None)
    parts = {"params": base} | ({} if lora is None else {"lora": lora.weights})
    dropout = dropout_key is not None

    def normed(x: Array) -> Array:
        return ops.rms_norm(x, base["final_norm"], config.rms_norm_eps)

    if not isinstance(base["layers"], tuple):
        model = Denoiser(config, adapter, dropout, keep, layout)
        rngs = {"dropout": dropout_key} if dropout else None
        x, key_values = model.apply(parts, tokens, context, cache, rngs=rngs)
        return lambda at: (normed(x if at is None else pick(x, at)), key_values)

    module = remat(Layer, config.remat)(config, adapter, dropout, keep, layout)

    def layer(
        n: int, x: Array, at: At | None = None, known: dict[str, Array] | None = None
    ) -> tuple[Array, KeyValues | None]:
        own = {name: tree["layers"][n] for name, tree in parts.items()}
        rngs = {"dropout": jax.random.fold_in(dropout_key, n)} if dropout else None
        if isinstance(at, slice) and config.remat != "none":
            # A function under rematerialisation takes arrays only.
            at = jnp.arange(at.start, at.stop)
        seen = None if cache is None else cache[n]
        return module.apply(own, x, seen, context, at, known, rngs=rngs)

    x, before = embed(config, base["embedding"], tokens), []
    known = {name: jnp.take(table, tokens, axis=0) for name, table in base.get("first_projections", {}).items()}
    for n in range(config.num_layers - 1):
        x, key_values = layer(n, x, known=known if n == 0 and known else None)
        before.append(key_values)

    def last(at: At | None) -> tuple[Array, Any]:
        final, key_values = layer(config.num_layers - 1, x, at)
        return normed(final), (*before, key_values)

    return last


def source(config: DenoiserConfig, at: At) -> At:
    """Returns the positions whose raw logits predict the tokens at the positions `at`; position 0 predicts itself."""
    if not config.next_token_logits:
        return at
    if isinstance(at, slice) and at.start > 0:
        return slice(at.start - 1, at.stop - 1)
    return jnp.maximum((jnp.arange(at.start, at.stop) if isinstance(at, slice) else at) - 1, 0)


def hidden_states_at(
    config: DenoiserConfig,
    base: Any,
    lora: LoRA | None,
    tokens: Int[Array, "B T"],
    *,
    prompt_mask: Bool[Array, "B P"] | None = None,
    texts: Int[Array, "B T"] | None = None,
    dropout_key: Array | None = None,
) -> Read:
    """Runs the denoiser; returns a function from positions to their target-aligned hidden states.

    Positions are a slice, `[S]`, `[B, S]` if each row has its own, or None for all. The states are those after the
    final norm, aligned so that index `i` predicts token `i` for every family.

    Args:
      config: the denoiser; its `dtype` is the compute dtype and that of the result.
      base: parameters as `init_base` or the hub's loader returns them, in any float dtype.
      lora: an adapter, or None for the base alone (the reference policy).
      tokens: `[B, T]` ids, with the mask token where a token is to be predicted.
      prompt_mask: `[B, P]` or `[B, T]`, True on real tokens; pads are never attended to. None: all are real.
      texts: for packed rows, instead of `prompt_mask`: the number of each token's text, from 1, and 0 on pads. Tokens
        attend only to their own text. Positions are counted along the row, which makes no difference, because
        rotations are relative.
      dropout_key: turns on the adapter's dropout.

    Raises:
      UserError: rows are packed and attention is block-causal.
    """
    if texts is not None:
        if config.block_size is not None:
            raise UserError("rows cannot be packed for a model of block-causal attention")
        prompt_mask = texts > 0
    length, real, shift = tokens.shape[1], real_tokens(prompt_mask, *tokens.shape), None
    layout = None if config.block_size is None else Layout(config.block_size, length)
    if layout is not None and real is not None and config.block_origin == "sequence":
        # Each row is rotated so that it begins at a multiple of the block size; its first pads move to the end.
        shift = jnp.argmax(real, axis=1, keepdims=True) % config.block_size
        columns = (jnp.arange(length) + shift) % length
        tokens, real = (jnp.take_along_axis(x, columns, axis=1) for x in (tokens, real))
    context = Context(real, rope_of(config, length, layout), texts=texts)
    last = run(config, base, lora, tokens, context, layout=layout, dropout_key=dropout_key)

    def read(at: At | None) -> Array:
        if shift is not None:
            at = slice(None) if at is None else at
            places = jnp.arange(length)[at] if isinstance(at, slice) else at
            return last((source(config, places) - shift) % length)[0]
        if at is not None:
            return last(source(config, at))[0]
        x, _ = last(None)
        # The head acts on each position alone, so shifting the hidden states shifts the logits.
        return jnp.concatenate([x[:, :1], x[:, :-1]], axis=1) if config.next_token_logits else x

    return read


def hidden_states(
    config: DenoiserConfig,
    base: Any,
    lora: LoRA | None,
    tokens: Int[Array, "B T"],
    *,
    prompt_mask: Bool[Array, "B P"] | None = None,
    texts: Int[Array, "B T"] | None = None,
    dropout_key: Array | None = None,
) -> Float[Array, "B T D"]:
    """Returns the target-aligned hidden states of all positions; see `hidden_states_at`."""
    options = {"prompt_mask": prompt_mask, "texts": texts, "dropout_key": dropout_key}
    return hidden_states_at(config, base, lora, tokens, **options)(None)


def refresh_cache(
    config: DenoiserConfig,
    base: Any,
    lora: LoRA | None,
    tokens: Int[Array, "B T"],
    at: At,
    *,
    around: tuple[Int[Array, ""], int] | None = None,
    prompt_mask: Bool[Array, "B P"] | None = None,
) -> tuple[Float[Array, "B S D"], Any]:
    """Runs a full pass; returns the hidden states of the positions `at`, and the cache for `window_states_at`.

    Args:
      around: start and size of the only window that will use the cache. The window's own keys and values are left out,
        except under cuDNN, where the window's passes write into them. None: the cache holds those of all tokens.
    """
    length = tokens.shape[1]
    kept = None if around is None or attention.chosen(config) == "cudnn" else _around(*around, length)
    context = Context(real_tokens(prompt_mask, *tokens.shape), rope_of(config, length), kept=kept)
    last = run(config, base, lora, tokens, context, keep=True)
    return last(source(config, at))


def _around(start: Array, size: int, length: int) -> Array:
    """Returns the positions outside a window, from the window's end onwards and wrapping around to its start."""
    return (start + size + jnp.arange(length - size)) % length


def window_states_at(
    config: DenoiserConfig,
    base: Any,
    lora: LoRA | None,
    tokens: Int[Array, "B T"],
    cache: Any,
    *,
    start: Int[Array, ""],
    size: int,
    frozen: Int[Array, ""] | None = None,
    prompt_mask: Bool[Array, "B P"] | None = None,
) -> Read:
    """Runs only the window of `size` tokens from position `start` on; returns a function that reads its positions.

    The function gives target-aligned hidden states; positions are counted from `start`. The arguments are those of
    `window_pass`.
    """
    last = window_pass(
        config, base, lora, tokens, cache, start=start, size=size, frozen=frozen, prompt_mask=prompt_mask
    )
    return lambda at: last(at)[0]


def window_pass(
    config: DenoiserConfig,
    base: Any,
    lora: LoRA | None,
    tokens: Int[Array, "B T"],
    cache: Any,
    *,
    start: Int[Array, ""],
    size: int,
    frozen: Int[Array, ""] | None = None,
    prompt_mask: Bool[Array, "B P"] | None = None,
    keep: bool = False,
) -> Callable[[At], tuple[Float[Array, "B S D"], Any]]:
    """Runs only the window of `size` tokens from position `start` on; returns a function that reads its positions.

    The function gives target-aligned hidden states and, with `keep` under cuDNN, the cache into which the window's keys
    and values are written. Positions are counted from `start`. If the cache was made of the same tokens, the states
    equal those of `hidden_states`; otherwise they are an approximation.

    Args:
      cache: the result of `refresh_cache`, called with `around` set to this window, or without `around` if `frozen` is
        given. It supplies the keys and values of positions outside the window and before `frozen`; those of all other
        positions are computed from `tokens`.
      start: the first position of the window, at least 1 where raw logits predict the next token.
      frozen: a position, at least `start`; None: no position of the window is frozen.
    """
    length, first, width = tokens.shape[1], start, size
    if config.next_token_logits:
        # The token in front of the window predicts its first token: index i of this pass predicts position i.
        first, width = start - 1, size + 1
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, first, width, axis=-1)  # noqa: E731
    # Each position is attended to once: in the window from `frozen` on, in the cache elsewhere.
    positions, real = jnp.arange(length), real_tokens(prompt_mask, *tokens.shape)
    inside = None if width == size else cut(positions >= start)[None]
    outside = None
    if frozen is not None:
        outside = ((positions < frozen) | (positions >= start + size))[None]
        inside = cut(~outside)
    if attention.chosen(config) == "cudnn":
        # The cache has all positions, those of the window included.
        outside = real
    elif real is not None:
        inside = cut(real) if inside is None else inside & cut(real)
        outside = real[:, _around(start, size, length)] if outside is None else outside & real
    rope = tuple(jax.lax.dynamic_slice_in_dim(t, first, width) for t in rope_of(config, length))
    return run(config, base, lora, cut(tokens), Context(inside, rope, outside, first), cache=cache, keep=keep)


def logits_from_hidden(config: DenoiserConfig, base: Any, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Computes float32 logits over the whole vocabulary."""
    head = head_weights(config, base).astype(hidden.dtype)
    return ops.product(hidden, head, precision_of(config), jnp.float32)


def denoise(
    config: DenoiserConfig,
    base: Any,
    lora: LoRA | None,
    tokens: Int[Array, "B T"],
    *,
    prompt_mask: Bool[Array, "B P"] | None = None,
    dropout_key: Array | None = None,
) -> Float[Array, "B T V"]:
    """Computes target-aligned float32 logits `[B, T, V]`; the arguments are those of `hidden_states_at`.

    Training and sampling never call this function: they apply the head only at the positions that they read.
    """
    hidden = hidden_states(config, base, lora, tokens, prompt_mask=prompt_mask, dropout_key=dropout_key)
    return constrain(logits_from_hidden(config, base, hidden), ("rows", "tokens", "vocab"))
