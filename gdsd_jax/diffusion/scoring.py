"""Per-token reads of a policy on masked views: log-probabilities, centred logits, entropy.

The vocabulary is walked in chunks, forwards and backwards, so nothing of shape `[B, L, V]` ever exists; every sum over
the vocabulary is float32. And each token is read from one view only: of the views that cover a completion together,
the hidden state of the one that masks the token is selected first, and the head runs once on the selection.

K denoiser passes, R reads per token, B rows, L completion tokens, D model size, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gdsd_jax.denoiser import DenoiserConfig, LoRA, head_weights, hidden_states
from gdsd_jax.sharding import constrain

DEFAULT_CHUNK = 16384


@flax.struct.dataclass
class Views:
    """Masked views of a batch and where each completion token is read.

    Attributes:
      masked: `[K, B, T]` bool, the tokens hidden in each denoiser pass.
      weights: `[R, B, L]` float32, what each read counts in a score; 0 where a token is not read.
      sources: static; for each of the R reads, the passes among which it chooses. A token is read in the first of them
        that masks it, in the last if none does. `((0, 1),)` is a coupled pair, `((0,),)` a single pass.
    """

    masked: Any
    weights: Any
    sources: tuple[tuple[int, ...], ...] = flax.struct.field(pytree_node=False)


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
      tokens: clean prompts and completions; the completion is the last L tokens, L from `views.weights`.
      reads: names of the quantities, see `read_tokens`.
      prompt_mask: `[B, P or T]`, True on real tokens.
      chunk: vocabulary entries whose logits exist at one time.

    Returns:
      `{read: [R, B, L] float32}`.
    """
    passes, rows, total = views.masked.shape
    length = views.weights.shape[-1]
    # The passes of a row stand together, and so on one device.
    noisy = jnp.where(jnp.moveaxis(views.masked, 0, 1), config.mask_token_id, tokens[:, None])
    repeated_mask = None if prompt_mask is None else jnp.repeat(prompt_mask, passes, axis=0)
    hidden = hidden_states(
        config, base, lora, noisy.reshape(rows * passes, total), prompt_mask=repeated_mask, dropout_key=dropout_key
    )
    hidden = jnp.moveaxis(hidden.reshape(rows, passes, total, -1)[:, :, total - length :], 1, 0)
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
    """What the head says of `targets` at `hidden`, as `{read: [*N] float32}`.

    Reads: "log_prob" is `z_y - logsumexp(z)`; "centred" is `z_y - mean_v z_v` (GDSD, arXiv 2605.29398, Eq. 8), which
    is one dot product with `w_y - mean_v w_v` and needs no normaliser; `("centred_top_k", k)` is `z_y` minus the mean
    of the k largest logits; "entropy" is that of `softmax(z)`, in nats.
    """
    head = head_weights(config, base).astype(hidden.dtype)
    precision = jax.lax.Precision.HIGHEST if config.dtype == "float32" else None
    top_k = next((r[1] for r in reads if isinstance(r, tuple)), None)
    if top_k is not None and top_k >= config.vocab_size:
        plain = {read: "centred" if isinstance(read, tuple) else read for read in reads}
        values = read_tokens(config, base, hidden, targets, tuple(plain.values()), chunk=chunk)
        return {read: values[name] for read, name in plain.items()}

    def dot(rows: Array) -> Array:
        return jnp.einsum("...d,...d->...", hidden, rows, precision=precision, preferred_element_type=jnp.float32)

    target = dot(jnp.take(head, targets, axis=0))
    out = {}
    if "centred" in reads:
        out["centred"] = target - dot(jnp.mean(head, axis=0, dtype=jnp.float32).astype(hidden.dtype))
    if top_k is None and not {"log_prob", "entropy"} & set(reads):
        return out
    with jax.named_scope("vocabulary"):
        stats = _vocabulary_statistics(hidden, head, precision, top_k, "entropy" in reads, chunk)
    if "log_prob" in reads:
        out["log_prob"] = target - stats["log_normaliser"]
    if "entropy" in reads:
        out["entropy"] = stats["log_normaliser"] - stats["mean_logit"]
    if top_k is not None:
        out[("centred_top_k", top_k)] = target - jnp.mean(stats["top"], axis=-1)
    return out


def _vocabulary_statistics(
    hidden: Array, head: Array, precision: Any, top_k: int | None, entropy: bool, chunk: int
) -> dict[str, Array]:
    """Log-normaliser, `sum_v p_v z_v` and the k largest logits, accumulated over chunks of the head's rows.

    The backward pass recomputes each chunk's logits, so that the gradient needs no more memory than the value.
    """
    vocab, width = head.shape
    shape = hidden.shape[:-1]
    start = {"log_normaliser": jnp.full(shape, -jnp.inf, jnp.float32)}
    if entropy:
        start["mean_logit"] = jnp.zeros(shape, jnp.float32)
    if top_k is not None:
        start["top"] = jnp.full((*shape, top_k), -jnp.inf, jnp.float32)

    def step(carry: dict, rows: Array) -> tuple[dict, None]:
        z = jnp.einsum("...d,vd->...v", hidden, rows, precision=precision, preferred_element_type=jnp.float32)
        z = constrain(z, ("views", "rows", "tokens", "vocab"))
        new = {"log_normaliser": jnp.logaddexp(carry["log_normaliser"], jax.nn.logsumexp(z, axis=-1))}
        if entropy:
            kept = jnp.exp(carry["log_normaliser"] - new["log_normaliser"]) * carry["mean_logit"]
            new["mean_logit"] = kept + jnp.sum(jnp.exp(z - new["log_normaliser"][..., None]) * z, axis=-1)
        if top_k is not None:
            best = jax.lax.top_k(z, min(top_k, z.shape[-1]))[0]
            new["top"] = jax.lax.top_k(jnp.concatenate([carry["top"], best], axis=-1), top_k)[0]
        return new, None

    if chunk >= vocab:
        return step(start, head)[0]
    size = _chunk_size(vocab, chunk)
    count = vocab // size
    # A chunk takes every count-th row: where the vocabulary is cut over devices, each has its share of every chunk.
    chunks = head[: count * size].reshape(size, count, width)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chunk_step(carry: dict, index: Array) -> tuple[dict, None]:
        return step(carry, jax.lax.dynamic_index_in_dim(chunks, index, axis=1, keepdims=False))

    stats, _ = jax.lax.scan(chunk_step, start, jnp.arange(count))
    return stats if count * size == vocab else step(stats, head[count * size :])[0]


def _chunk_size(vocab: int, chunk: int) -> int:
    """The largest divisor of `vocab` in `(chunk/2, chunk]`, so that no rest is left; `chunk` where there is none."""
    return next((size for size in range(chunk, chunk // 2, -1) if vocab % size == 0), chunk)
