"""Reads per-token quantities of a policy on masked views: log-probabilities, centred logits, entropies.

The vocabulary is computed in chunks, in the forward and in the backward pass, so that no array `[B, L, V]` ever exists.
Every sum over the vocabulary is float32. Each token is read from one view only: of the views that together cover a
completion, the hidden state in the view that masks the token is selected first, and the head runs on the selection.

K denoiser passes, R reads per token, B rows, L completion tokens, D model size, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gdsd_jax.denoiser import (
    DenoiserConfig,
    LoRA,
    head_weights,
    hidden_states_at,
    noisy_states_at,
    ops,
    precision_of,
)
from gdsd_jax.runtime.sharding import constrain

DEFAULT_CHUNK = 16384


@flax.struct.dataclass
class Views:
    """Masked views of a batch, and the view in which each completion token is read.

    Attributes:
      masked: `[K, B, T]` bool, the tokens that are hidden in each denoiser pass.
      weights: `[R, B, L]` float32, the weight of each read in a score; 0 where a token is not read.
      sources: static, for each of the R reads the passes from which it is taken. A token is read in the first of these
        passes that masks it, or in the last if none does. `((0, 1),)` is a coupled pair, `((0,),)` a single pass.
    """

    masked: Any
    weights: Any
    sources: tuple[tuple[int, ...], ...] = flax.struct.field(pytree_node=False)

    def read(self, *arguments: Any, **options: Any) -> dict:
        """Reads views of this kind; the arguments are those of `read_views`."""
        return _read_chosen(*arguments, **options)

    def predicted(self) -> Bool[Array, "R B L"]:
        """Returns where the pass in which a token is read masks this token."""
        masked = self.masked[:, :, -self.weights.shape[-1] :]
        return jnp.stack([jnp.any(masked[jnp.array(source)], axis=0) for source in self.sources])


def read_views(
    config: DenoiserConfig,
    base: Any,
    lora: LoRA | None,
    tokens: Int[Array, "B T"],
    views: Views,
    reads: tuple,
    *,
    prompt_mask: Array | None = None,
    dropout_key: Array | None = None,
    chunk: int = DEFAULT_CHUNK,
) -> dict:
    """Reads the clean completion tokens in their masked views.

    Args:
      tokens: clean prompts and completions; the completion is the last L tokens, with the L of `views.weights`.
      reads: names of the quantities, see `read_tokens`.
      prompt_mask: `[B, P or T]`, True on real tokens.
      chunk: vocabulary entries whose logits exist at one time.

    Returns:
      `{read: [R, B, L] float32}`; "hidden" is `[R, B, L, D]`.
    """
    options = {"prompt_mask": prompt_mask, "dropout_key": dropout_key, "chunk": chunk}
    return views.read(config, base, lora, tokens, views, reads, **options)


def _read_chosen(
    config: DenoiserConfig,
    base: Any,
    lora: LoRA | None,
    tokens: Int[Array, "B T"],
    views: Views,
    reads: tuple,
    *,
    prompt_mask: Array | None,
    dropout_key: Array | None,
    chunk: int,
) -> dict:
    """Reads each token once per source, in the first pass of the source that masks it."""
    passes, rows, total = views.masked.shape
    length = views.weights.shape[-1]
    # The passes of a row are adjacent, and so on one device.
    noisy = jnp.where(jnp.moveaxis(views.masked, 0, 1), config.mask_token_id, tokens[:, None])
    noisy = noisy.reshape(rows * passes, total)
    repeated_mask = None if prompt_mask is None else jnp.repeat(prompt_mask, passes, axis=0)
    given = {"prompt_mask": repeated_mask, "dropout_key": dropout_key}
    if config.block_size is None:
        read = hidden_states_at(config, base, lora, noisy, **given)
    else:
        # Under block-causal attention, masked blocks attend to a clean copy of the blocks before them.
        clean = jnp.repeat(tokens, passes, axis=0)
        read = noisy_states_at(config, base, lora, clean, noisy, length=length, **given)
    hidden = jnp.moveaxis(read(slice(total - length, total)).reshape(rows, passes, length, -1), 1, 0)
    masked = views.masked[:, :, total - length :, None]
    selected = []
    for source in views.sources:
        h = hidden[source[-1]]
        for index in reversed(source[:-1]):
            h = jnp.where(masked[index], hidden[index], h)
        selected.append(h)
    targets = jnp.broadcast_to(tokens[:, total - length :], (len(selected), rows, length))
    return read_tokens(config, base, jnp.stack(selected), targets, reads, chunk=chunk)


def read_tokens(
    config: DenoiserConfig,
    base: Any,
    hidden: Float[Array, "*N D"],
    targets: Int[Array, "*N"],
    reads: tuple,
    *,
    chunk: int,
) -> dict:
    """Computes the reads of `targets` from hidden states, as `{read: [*N] float32}`.

        "log_prob"              z_y - logsumexp(z)
        "centred"               z_y - mean_v z_v                                   (GDSD, arXiv 2605.29398, Eq. 8)
        ("centred_top_k", k)    z_y minus the mean of the k largest logits
        "entropy"               the entropy of softmax(z), in nats
        "entropy_value"         the same without a gradient, for metrics
        "hidden"                the hidden state itself, `[*N, D]`

    for the logits `z` of a hidden state and its target `y`. "centred" needs no pass over the vocabulary: it is the dot
    product of the hidden state with `w_y - mean_v w_v`, where `w_v` are the rows of the head.

    Args:
      chunk: vocabulary entries whose logits exist at one time.
    """
    head = head_weights(config, base)
    precision = precision_of(config)
    top_k = next((r[1] for r in reads if isinstance(r, tuple)), None)
    if top_k is not None and top_k >= config.vocab_size:
        plain = {read: "centred" if isinstance(read, tuple) else read for read in reads}
        values = read_tokens(config, base, hidden, targets, tuple(plain.values()), chunk=chunk)
        return {read: values[name] for read, name in plain.items()}

    with jax.named_scope("vocabulary"):
        if top_k is not None or "entropy" in reads:
            stats = _vocabulary_statistics(hidden, head, targets, precision, top_k, chunk)
            target, normaliser, mean_logit = stats["target"], stats["log_normaliser"], stats["mean_logit"]
        elif {"log_prob", "entropy_value"} & set(reads):
            target, normaliser, mean_logit = target_and_normaliser(hidden, head, targets, precision, chunk)
        else:
            target = _row_logits(hidden, jnp.take(head, targets, axis=0), precision)
    out = {}
    if "hidden" in reads:
        out["hidden"] = hidden.astype(jnp.float32)
    if "centred" in reads:
        out["centred"] = target - _row_logits(hidden, jnp.mean(head, axis=0, dtype=jnp.float32), precision)
    if "log_prob" in reads:
        out["log_prob"] = target - normaliser
    if "entropy" in reads:
        out["entropy"] = normaliser - mean_logit
    if "entropy_value" in reads:
        out["entropy_value"] = jax.lax.stop_gradient(normaliser - mean_logit)
    if top_k is not None:
        out[("centred_top_k", top_k)] = target - jnp.mean(stats["top"], axis=-1)
    return out


def _row_logits(hidden: Float[Array, "*N D"], rows: Array, precision: Any) -> Float[Array, "*N"]:
    """Computes the logit of each hidden state for its own row of the head.

    The rows are cast after they are picked, so that the gradient of the head is not cast.
    """
    return jnp.einsum(
        "...d,...d->...", hidden, rows.astype(hidden.dtype), precision=precision, preferred_element_type=jnp.float32
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def target_and_normaliser(
    hidden: Float[Array, "*N D"], head: Float[Array, "V D"], targets: Int[Array, "*N"], precision: Any, chunk: int
) -> tuple[Float[Array, "*N"], Float[Array, "*N"], Float[Array, "*N"]]:
    """Computes `z_y`, `logsumexp(z)`, and `sum_v p_v z_v`, the last without a gradient.

    The gradient of `z_y - logsumexp(z)` in the hidden state is `w_y - sum_v p_v w_v`. Where a token is confident these
    two rows are nearly equal, so both stay float32 until they are subtracted. The forward pass accumulates the second
    row beside the normaliser and rescales it as the maximum grows. Thus no logit is computed twice, and two products
    with the head suffice instead of three. The gradient of a trained head sums `onehot - p` over tokens in float32.
    """
    normaliser, mean_logit, _ = _normaliser(hidden, head, precision, chunk, False)
    return _row_logits(hidden, jnp.take(head, targets, axis=0), precision), normaliser, mean_logit


def _normaliser(hidden: Array, head: Array, precision: Any, chunk: int, pull: bool) -> tuple[Array, Array, Any]:
    """Computes the log-normaliser and, under `softmax(z)`, the mean logit and, with `pull`, the head's mean row."""
    shape = hidden.shape[:-1]
    # In float32 the mean logit is that of the mean row; in bfloat16 this would round it too much.
    by_row = pull and hidden.dtype == jnp.float32
    zero = jnp.zeros(shape, jnp.float32)
    start = (jnp.full(shape, -jnp.inf, jnp.float32), zero, zero, jnp.zeros(hidden.shape, jnp.float32) if pull else None)

    def step(carry: tuple, rows: Array, _: Array) -> tuple:
        highest, total, weighted, pulled = carry
        rows = rows.astype(hidden.dtype)
        z = chunk_logits(hidden, rows, hidden.dtype, precision)
        new = jnp.maximum(highest, jnp.max(z, axis=-1))
        weights, kept = jnp.exp(z - new[..., None]), jnp.exp(highest - new)
        total = kept * total + jnp.sum(weights, axis=-1)
        if not by_row:
            weighted = kept * weighted + jnp.sum(weights * z, axis=-1)
        if pull:
            rows = jnp.einsum(
                "...v,vd->...d", weights.astype(rows.dtype), rows,
                precision=precision, preferred_element_type=jnp.float32,
            )  # fmt: skip
            pulled = kept[..., None] * pulled + rows
        return new, total, weighted, pulled

    highest, total, weighted, pulled = over_chunks(step, start, head, chunk)
    normaliser, mean_logit = highest + jnp.log(total), weighted / total
    mean_row = pulled / total[..., None] if pull else None
    return normaliser, ops.sum_of_products(hidden, mean_row) if by_row else mean_logit, mean_row


def _target_and_normaliser_forward(
    hidden: Array, head: Array, targets: Array, precision: Any, chunk: int
) -> tuple[tuple, tuple]:
    normaliser, mean_logit, pulled = _normaliser(hidden, head, precision, chunk, True)
    target = _row_logits(hidden, jnp.take(head, targets, axis=0), precision)
    return (target, normaliser, mean_logit), (pulled, hidden, head, targets)


def _target_and_normaliser_backward(
    precision: Any, chunk: int, saved: tuple, gradients: tuple
) -> tuple[Array, Array, None]:
    pulled, hidden, head, targets = saved
    of_target, of_normaliser, _ = gradients
    rows = jnp.take(head, targets, axis=0).astype(hidden.dtype).astype(jnp.float32)
    of_hidden = of_target[..., None] * rows + of_normaliser[..., None] * pulled

    def of_head(head: Array) -> tuple[Array, Array]:
        stats = _vocabulary_statistics(hidden, head, targets, precision, None, chunk)
        return stats["target"], stats["log_normaliser"]

    # The compiler drops the gradient of the head where the head is not trained.
    return of_hidden.astype(hidden.dtype), jax.vjp(of_head, head)[1]((of_target, of_normaliser))[0], None


target_and_normaliser.defvjp(_target_and_normaliser_forward, _target_and_normaliser_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def chunk_logits(hidden: Float[Array, "*N D"], rows: Float[Array, "C D"], dtype: Any, precision: Any) -> Array:
    """Computes float32 logits `[*N, C]` from factors cast to `dtype`; gradients have the dtypes of the arguments."""
    z = jnp.einsum(
        "...d,vd->...v", hidden.astype(dtype), rows.astype(dtype),
        precision=precision, preferred_element_type=jnp.float32,
    )  # fmt: skip
    return constrain(z, ("views", "rows", "tokens", "vocab"))


def _logits_forward(hidden: Array, rows: Array, dtype: Any, precision: Any) -> tuple[Array, tuple]:
    return chunk_logits(hidden, rows, dtype, precision), (hidden, rows)


def _logits_backward(dtype: Any, precision: Any, saved: tuple, gradient: Array) -> tuple[Array, Array]:
    hidden, rows = saved
    # The gradient of a logit is complete here (`onehot - p`), so that the cast rounds only the difference.
    gradient = gradient.astype(dtype)
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    of_hidden = product("...v,vd->...d", gradient, rows.astype(dtype))
    of_rows = product("...v,...d->vd", gradient, hidden.astype(dtype))
    return of_hidden.astype(hidden.dtype), of_rows.astype(rows.dtype)


chunk_logits.defvjp(_logits_forward, _logits_backward)


def _vocabulary_statistics(
    hidden: Array, head: Array, targets: Array, precision: Any, top_k: int | None, chunk: int
) -> dict[str, Array]:
    """Computes the target's logit, the log-normaliser, `sum_v p_v z_v` and the k largest logits, chunk by chunk.

    The backward pass recomputes each chunk's logits, so that the gradient needs no more memory than the value.
    """
    shape, dtype = hidden.shape[:-1], hidden.dtype
    zero = jnp.zeros(shape, jnp.float32)
    start = {"target": zero, "log_normaliser": jnp.full(shape, -jnp.inf, jnp.float32), "mean_logit": zero}
    if top_k is not None:
        start["top"] = jnp.full((*shape, top_k), -jnp.inf, jnp.float32)
    # The gradients of all chunks add up in float32.
    wide = hidden.astype(jnp.float32)

    def step(carry: dict, rows: Array, ids: Array) -> dict:
        z = chunk_logits(wide, rows, dtype, precision)
        new = {"target": carry["target"] + jnp.sum(jnp.where(ids == targets[..., None], z, 0.0), axis=-1)}
        new["log_normaliser"] = jnp.logaddexp(carry["log_normaliser"], jax.nn.logsumexp(z, axis=-1))
        kept = jnp.exp(carry["log_normaliser"] - new["log_normaliser"]) * carry["mean_logit"]
        new["mean_logit"] = kept + ops.sum_of_products(jnp.exp(z - new["log_normaliser"][..., None]), z)
        if top_k is not None:
            best = jax.lax.top_k(z, min(top_k, z.shape[-1]))[0]
            new["top"] = jax.lax.top_k(jnp.concatenate([carry["top"], best], axis=-1), top_k)[0]
        return new

    return over_chunks(step, start, head, chunk)


def over_chunks(step: Callable[[Any, Array, Array], Any], carry: Any, head: Float[Array, "V D"], chunk: int) -> Any:
    """Folds `step(carry, rows, ids)` over chunks of the head's rows; the order of the rows is not that of their ids.

    Args:
      chunk: the largest number of rows in a chunk.
    """
    vocab, width = head.shape
    if chunk >= vocab:
        return step(carry, head, jnp.arange(vocab))
    size = _chunk_size(vocab, chunk)
    count = vocab // size
    # A chunk takes every count-th row, so that devices that share the vocabulary each have a part of every chunk.
    chunks = head[: count * size].reshape(size, count, width)
    take = functools.partial(jax.lax.dynamic_index_in_dim, chunks, axis=1, keepdims=False)
    ids = count * jnp.arange(size)
    # Without the checkpoint, a gradient would keep each chunk of the head and its logits.
    one = jax.checkpoint(lambda carry, index: (step(carry, take(index), ids + index), None), prevent_cse=False)
    carry, _ = jax.lax.scan(one, carry, jnp.arange(count))
    done = count * size
    return carry if done == vocab else step(carry, head[done:], jnp.arange(done, vocab))


def _chunk_size(vocab: int, chunk: int) -> int:
    """Returns the largest divisor of `vocab` in `(chunk/2, chunk]`, or `chunk` if there is none."""
    return next((size for size in range(chunk, chunk // 2, -1) if vocab % size == 0), chunk)
