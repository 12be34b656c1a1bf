"""The masked denoiser's modules: Linen around the functions of `ops`, and a scan over layers.

Parameters are nested dictionaries of arrays. The collection `params` is the base, and the collection `lora` is an
adapter; without a `lora` collection the model is the base alone. Only this file and `forward` use Flax modules.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Shaped

from gdsd_jax.denoiser import attention, ops, splash
from gdsd_jax.denoiser.config import DenoiserConfig
from gdsd_jax.denoiser.layout import Layout
from gdsd_jax.denoiser.lora import LoRA, target_shapes
from gdsd_jax.denoiser.quantise import quantised
from gdsd_jax.runtime.sharding import constrain, gathered

# Logical names of the output and the input axis of each matrix. `logical_axes` gives them to the code that places
# parameters on a mesh.
WEIGHT_AXES = {
    "q": ("heads", "embed"),
    "k": ("kv_heads", "embed"),
    "v": ("kv_heads", "embed"),
    "o": ("embed", "heads"),
    "gate": ("mlp", "embed"),
    "up": ("mlp", "embed"),
    "down": ("embed", "mlp"),
}
RESIDUAL_AXES = ("rows", "tokens", "residual")


def precision_of(config: DenoiserConfig) -> jax.lax.Precision:
    """Returns the precision of matrix products: with "float32", full precision on every platform."""
    return jax.lax.Precision.HIGHEST if config.dtype == "float32" else jax.lax.Precision.DEFAULT


class KeyValues(NamedTuple):
    """The rotated keys and the values of a layer, or of N stacked layers, whose axis is then the first.

    For plain attention, keys are `[N, B, kv, K, T]` and values `[N, B, kv, T, K]`; for cuDNN both are
    `[N, B, T, kv, K]`.
    """

    keys: Any
    values: Any


class Context(NamedTuple):
    """The arrays of a pass that all layers share, for the T tokens that the pass computes.

    Attributes:
      real: `[B, T]` bool, True on the tokens that others may attend to; None: all are.
      rope: the rotation tables of the tokens' positions, see `ops.rope_tables`.
      outside: with a cache, which of its columns are attended to, `[B, columns]` bool; None: all. Under cuDNN the cache
        has all columns, those of the pass included.
      start: under cuDNN with a cache, the column from which on the tokens' own keys and values are written into it.
      kept: the tokens whose keys and values are returned, where they are; None: all.
      texts: `[B, T]`, for packed rows the number of each token's text; tokens attend only to their own text.
    """

    real: Array | None
    rope: tuple[Array, Array]
    outside: Array | None = None
    start: Array | None = None
    kept: Array | None = None
    texts: Array | None = None


def adapter_axes(out: str, into: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """Returns the logical axis names of an adapter's A and B, for a matrix with the axes `out` and `into`."""
    rank = lambda other: "lora_rank" if other == "embed" else "lora_rank_split"  # noqa: E731
    return (into, rank(into)), (rank(out), out)


def _normal(key: Array, shape: tuple[int, int], dtype: Any) -> Array:
    """Draws a matrix `[out, in]` of standard deviation `in^-0.5`.

    It is drawn as `[in, out]`, so that a seed gives the numbers that it has always given.
    """
    return nn.initializers.normal(shape[1] ** -0.5)(key, shape[::-1], dtype).T


class Linear(nn.Module):
    """Computes `x W^T (+ b)`, plus `(x A) B` if the `lora` collection has an adapter for this module.

    The parameter `weight` is `[out, in]`, as checkpoints store it, so that no host turns it. If the `lora` collection
    has the matrix `joined` (see `prepared`), one product computes both terms. With weights in 8 bits, `weight` is int8,
    and the parameter `scale` holds a float32 factor for each output channel.
    """

    config: DenoiserConfig
    shape: tuple[int, int]
    axes: tuple[str, str]
    bias: bool = False
    adapter: LoRA | None = None

    @nn.compact
    def __call__(self, x: Array, dropout: bool) -> Array:
        dtype, precision = jnp.dtype(self.config.dtype), precision_of(self.config)
        small = self.config.weights == "int8"
        out, out_axis = self.shape[:1], self.axes[:1]
        init = nn.with_logical_partitioning(nn.initializers.zeros_init() if small else _normal, self.axes)
        weight = self.param("weight", init, self.shape, jnp.int8 if small else jnp.float32)
        weight, addends = gathered(weight if small else weight.astype(dtype), self.axes), []
        if small:
            scale_init = nn.with_logical_partitioning(nn.initializers.ones_init(), out_axis)
            weight = weight, gathered(self.param("scale", scale_init, out, jnp.float32), out_axis)
        if self.bias:
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), out_axis)
            addends.append(self.param("bias", bias_init, out, jnp.float32).astype(dtype))
        if self.has_variable("lora", "joined"):
            a, weight = (self.get_variable("lora", name) for name in ("a", "joined"))
            x = jnp.concatenate([x, jnp.dot(x, a, precision=precision)], axis=-1)
            if not addends:
                return ops.product(x, weight, precision)
        elif self.adapter is not None and self.has_variable("lora", "a"):
            seen = x
            if dropout and self.adapter.dropout:
                seen = nn.Dropout(self.adapter.dropout, deterministic=False, name="drop")(x)
            scales = {"a": 1.0, "b": self.adapter.alpha / self.adapter.rank}
            factors = [(scale * self.get_variable("lora", name)).astype(dtype) for name, scale in scales.items()]
            a, b = map(gathered, factors, adapter_axes(*self.axes))
            addends.append(ops.low_rank(seen, a, b, precision))
        # remat="dots" keeps this rounded sum, which in bfloat16 takes half the memory of the float32 product inside.
        return checkpoint_name(ops.product_plus(x, weight, tuple(addends), precision), "product")


def linear_of(config: DenoiserConfig, name: str, adapter: LoRA | None) -> Linear:
    """Builds the module for one of the seven matrices of a layer."""
    bias = config.qkv_bias and name in ("q", "k", "v")
    return Linear(config, target_shapes(config)[name][::-1], WEIGHT_AXES[name], bias, adapter, name=name)


class Layer(nn.Module):
    """Runs a pre-norm block: attention and SwiGLU, each added to the residual stream.

    With a `cache`, `x` is a window of the tokens, which attends to itself and to the cache. Under cuDNN, the window's
    keys and values replace those of its columns in the cache where the window is real, and `keep` returns all columns.

    With `at` (see `pick`), only those positions act as queries and are returned; all of `x` supplies keys and values.
    With `keep`, keys and values are returned too. `known` holds queries, keys and values of `x` before norm and
    rotation, if they are computed already. A `layout` restricts which columns attend to which; packed rows have none.
    """

    config: DenoiserConfig
    adapter: LoRA | None
    dropout: bool
    keep: bool = False
    layout: Layout | None = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        cache: KeyValues | None,
        context: Context,
        at: slice | Array | None = None,
        known: dict[str, Array] | None = None,
    ) -> tuple[Array, KeyValues | None]:
        c = self.config
        real, rope, outside, start, kept, texts = context

        def linear(name: str, inputs: Array) -> Array:
            return linear_of(c, name, self.adapter)(inputs, self.dropout)

        def norm(name: str, inputs: Array) -> Array:
            init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
            return ops.rms_norm(inputs, self.param(name, init, inputs.shape[-1:], jnp.float32), c.rms_norm_eps)

        def heads(name: str, inputs: Array) -> Array:
            flat = linear(name, inputs) if known is None else known[name]
            split = flat.reshape(*inputs.shape[:2], -1, c.head_dim)
            split = constrain(split, ("rows", "tokens", WEIGHT_AXES[name][0], "head_dim"))
            return norm(f"{name}_norm", split) if c.qk_norm and name != "v" else split

        with jax.named_scope("attention"):
            h = norm("attn_norm", x)
            k, v = ops.rotate(heads("k", h), rope), heads("v", h)
            if at is not None:
                x, h, rope = pick(x, at), pick(h, at), tuple(_table_at(table, at) for table in rope)
            q = ops.rotate(heads("q", h), rope)
            kind = attention.chosen(c)
            if kind == "splash" and cache is None and at is None:
                # The kernel requires as many queries as keys.
                mixed = splash.attention(q, k, v, real if texts is None else texts, layout=self.layout)
            else:
                allowed = None if self.layout is None else allowed_of(self.layout, k.shape[1], at)
                if texts is not None:
                    allowed = same_text(texts, at)
                if kind == "cudnn":
                    seen = real
                    if cache is not None:
                        (k, v), seen = attention.written(cache, (k, v), start, real), outside
                    mixed = attention.cudnn(q, k, v, seen, allowed)
                else:
                    cached = None if cache is None else (*cache, outside)
                    mixed = ops.attention(q, k, v, real, precision_of(c), cached, allowed)
            if c.blind_pads and real is not None:
                sees = jnp.broadcast_to(real, (len(x), real.shape[1]))[..., None].astype(mixed.dtype)
                mixed = jnp.where((sees if at is None else pick(sees, at))[..., None] > 0, mixed, 0)
            x = constrain(x + linear("o", mixed.reshape(*x.shape[:2], -1)), RESIDUAL_AXES)
        with jax.named_scope("mlp"):
            h = norm("mlp_norm", x)
            # The products are the widest arrays of a layer; computing them again costs less than keeping them.
            gated = jax.checkpoint(ops.gated, prevent_cse=False) if c.remat == "none" else ops.gated
            inner = constrain(gated(linear("gate", h), linear("up", h)), ("rows", "tokens", "mlp"))
            x = constrain(x + linear("down", inner), RESIDUAL_AXES)
        if not self.keep:
            return x, None
        if kept is not None:
            k, v = k[:, kept], v[:, kept]
        return x, KeyValues(k, v) if kind == "cudnn" else KeyValues(k.transpose(0, 2, 3, 1), v.swapaxes(1, 2))


def allowed_of(layout: Layout, length: int, at: slice | Array | None) -> Bool[Array, "#B S T"]:
    """Returns which columns each query attends to; the queries are the columns `at` (None: all)."""
    keys = jnp.arange(length)
    queries = keys if at is None else keys[at] if isinstance(at, slice) else at
    return layout.attends(jnp.atleast_2d(queries)[..., None], keys)


def same_text(texts: Int[Array, "B T"], at: slice | Array | None) -> Bool[Array, "B S T"]:
    """Returns which columns of packed rows belong to the text of each query; the queries are as in `allowed_of`."""
    queries = texts if at is None else pick(texts[..., None], at)[..., 0]
    return queries[..., None] == texts[:, None]


def pick(x: Shaped[Array, "B T D"], at: slice | Int[Array, " S"] | Int[Array, "B S"]) -> Shaped[Array, "B S D"]:
    """Picks the positions `at` out of `x`; they are the same for every row (a slice or `[S]`) or each row's own."""
    if isinstance(at, slice) or at.ndim == 1:
        return x[:, at]
    return jnp.take_along_axis(x, at[..., None], axis=1)


def _table_at(table: Array, at: slice | Array) -> Array:
    """Picks the positions `at` (see `pick`) out of a rotation table, `[T, 2, K/2]` or `[B, T, 2, K/2]`."""
    if table.ndim == 3:
        return table[at]
    return pick(table.reshape(*table.shape[:2], -1), at).reshape(len(table), -1, *table.shape[2:])


def remat(layer: type[nn.Module], policy: str) -> type[nn.Module]:
    """Returns the layer with the rematerialisation that `DenoiserConfig.remat` names."""
    if policy == "none":
        return layer
    saveable = jax.checkpoint_policies.save_only_these_names("product") if policy == "dots" else None
    return nn.remat(layer, policy=saveable, prevent_cse=False)


def embed(config: DenoiserConfig, embedding: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Returns the residual stream before the first layer."""
    return constrain(jnp.take(embedding, tokens, axis=0).astype(config.dtype), RESIDUAL_AXES)


def head_weights(config: DenoiserConfig, base: Any) -> Float[Array, "V D"]:
    """Returns the rows of the output head, which are those of the embedding where the two are tied."""
    return base["embedding"] if config.tied_head else base["head"]


class Denoiser(nn.Module):
    """Maps token ids to the residual stream after the last layer, and to keys and values.

    `cache`, `keep` and `layout` are as in `Layer`. This module declares the parameters of the final norm and of the
    head; `forward` applies them.
    """

    config: DenoiserConfig
    adapter: LoRA | None = None
    dropout: bool = False
    keep: bool = False
    layout: Layout | None = None

    @nn.compact
    def __call__(
        self, tokens: Array, context: Context, cache: KeyValues | None = None
    ) -> tuple[Array, KeyValues | None]:
        c = self.config
        table_init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        embedding = self.param("embedding", table_init, (c.vocab_size, c.hidden_size), jnp.float32)
        if not c.tied_head:
            self.param("head", table_init, (c.vocab_size, c.hidden_size), jnp.float32)
        x = embed(c, embedding, tokens)
        layers = nn.scan(
            remat(Layer, c.remat),
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=c.num_layers,
            unroll=c.layer_unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        norm_init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
        self.param("final_norm", norm_init, (c.hidden_size,), jnp.float32)
        stack = layers(c, self.adapter, self.dropout, self.keep, self.layout, name="layers")
        return stack(x, cache, context)


def _init(config: DenoiserConfig, key: jax.Array) -> Any:
    tables = ops.rope_tables(jnp.arange(2), config.head_dim, config.rope_theta)
    return Denoiser(config).init(key, jnp.zeros((1, 2), jnp.int32), Context(None, tables))["params"]


def init_base(config: DenoiserConfig, key: jax.Array) -> dict:
    """Draws random float32 base parameters: normal matrices of standard deviation `in^-0.5`, norms of one.

    With weights in 8 bits, the matrices are the same draws, rounded.
    """
    drawn = dataclasses.replace(config, weights="stored")
    round_ = quantised if config.weights == "int8" else lambda base: base
    return jax.jit(lambda key: round_(nn.meta.unbox(_init(drawn, key))))(key)


def logical_axes(config: DenoiserConfig, lora: LoRA | None = None) -> Any:
    """Returns the logical axis names of every parameter, as tuples in the structure of the base (or of the adapter)."""
    if lora is not None:
        stacked = lambda factors: {name: ("layers", *axes) for name, axes in zip("ab", factors, strict=True)}  # noqa: E731
        return {"layers": {target: stacked(adapter_axes(*WEIGHT_AXES[target])) for target in lora.targets}}
    boxed = jax.eval_shape(functools.partial(_init, config), jax.random.key(0))
    return jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))
