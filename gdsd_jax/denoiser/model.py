"""The masked denoiser: Linen modules over the functions of `ops`, a scan over layers, and pure entry points.

Parameters are plain nested dictionaries of arrays. The collection `params` is the base, the collection `lora` an
adapter; a missing `lora` collection is the reference policy. Flax goes no further than this file.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gdsd_jax.denoiser import ops, splash
from gdsd_jax.denoiser.config import DenoiserConfig
from gdsd_jax.denoiser.lora import LoRA, target_shapes
from gdsd_jax.errors import UserError
from gdsd_jax.sharding import constrain

# Logical names of the two axes of each matrix; `gdsd_jax.denoiser.logical_axes` hands them to whoever owns a mesh.
KERNEL_AXES = {
    "q": ("embed", "heads"),
    "k": ("embed", "kv_heads"),
    "v": ("embed", "kv_heads"),
    "o": ("heads", "embed"),
    "gate": ("embed", "mlp"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
}
RESIDUAL_AXES = ("rows", "tokens", "residual")


def _precision(config: DenoiserConfig) -> jax.lax.Precision:
    return jax.lax.Precision.HIGHEST if config.dtype == "float32" else jax.lax.Precision.DEFAULT


class Linear(nn.Module):
    """`x W (+ b)`, plus the adapter's product where the `lora` collection has one under this module's name."""

    config: DenoiserConfig
    features: tuple[int, int]
    axes: tuple[str, str]
    bias: bool = False
    adapter: LoRA | None = None

    @nn.compact
    def __call__(self, x: Array, dropout: bool) -> Array:
        dtype, precision = jnp.dtype(self.config.dtype), _precision(self.config)
        kernel_init = nn.with_logical_partitioning(nn.initializers.normal(self.features[0] ** -0.5), self.axes)
        kernel = self.param("kernel", kernel_init, self.features, jnp.float32)
        y = jnp.dot(x, kernel.astype(dtype), precision=precision)
        if self.bias:
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), self.axes[1:])
            y = y + self.param("bias", bias_init, self.features[1:], jnp.float32).astype(dtype)
        if self.adapter is not None and self.has_variable("lora", "a"):
            if dropout and self.adapter.dropout:
                x = nn.Dropout(self.adapter.dropout, deterministic=False, name="drop")(x)
            a = self.get_variable("lora", "a").astype(dtype)
            b = self.get_variable("lora", "b").astype(dtype)
            scale = self.adapter.alpha / self.adapter.rank
            y = y + scale * jnp.dot(jnp.dot(x, a, precision=precision), b, precision=precision)
        return y


class Layer(nn.Module):
    """Pre-norm block: attention and SwiGLU, each added to the residual stream."""

    config: DenoiserConfig
    adapter: LoRA | None
    dropout: bool

    @nn.compact
    def __call__(self, x: Array, real: Array | None, angles: Array) -> tuple[Array, None]:
        c = self.config
        shapes = target_shapes(c)

        def linear(name: str, inputs: Array) -> Array:
            bias = c.qkv_bias and name in ("q", "k", "v")
            module = Linear(c, shapes[name], KERNEL_AXES[name], bias, self.adapter, name=name)
            return module(inputs, self.dropout)

        def norm(name: str, inputs: Array) -> Array:
            init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
            return ops.rms_norm(inputs, self.param(name, init, (c.hidden_size,), jnp.float32), c.rms_norm_eps)

        def heads(name: str, inputs: Array) -> Array:
            split = linear(name, inputs).reshape(*inputs.shape[:2], -1, c.head_dim)
            return constrain(split, ("rows", "tokens", KERNEL_AXES[name][1], "head_dim"))

        with jax.named_scope("attention"):
            h = norm("attn_norm", x)
            q, k, v = ops.rotate(heads("q", h), angles), ops.rotate(heads("k", h), angles), heads("v", h)
            plain = functools.partial(ops.attention, precision=_precision(c))
            mixed = (splash.attention if splash.chosen(c) else plain)(q, k, v, real)
            x = constrain(x + linear("o", mixed.reshape(*x.shape[:2], -1)), RESIDUAL_AXES)
        with jax.named_scope("mlp"):
            h = norm("mlp_norm", x)
            inner = constrain(jax.nn.silu(linear("gate", h)) * linear("up", h), ("rows", "tokens", "mlp"))
            x = constrain(x + linear("down", inner), RESIDUAL_AXES)
        return x, None


def _remat(layer: type[nn.Module], policy: str) -> type[nn.Module]:
    if policy == "none":
        return layer
    saveable = jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims if policy == "dots" else None
    return nn.remat(layer, policy=saveable, prevent_cse=False)


class Denoiser(nn.Module):
    """Token ids to target-aligned hidden states."""

    config: DenoiserConfig
    adapter: LoRA | None = None
    dropout: bool = False

    @nn.compact
    def __call__(self, tokens: Array, real: Array | None) -> Array:
        c = self.config
        table_init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        embedding = self.param("embedding", table_init, (c.vocab_size, c.hidden_size), jnp.float32)
        if not c.tied_head:
            self.param("head", table_init, (c.vocab_size, c.hidden_size), jnp.float32)
        x = constrain(jnp.take(embedding, tokens, axis=0).astype(c.dtype), RESIDUAL_AXES)
        angles = ops.rope_angles(jnp.arange(tokens.shape[1]), c.head_dim, c.rope_theta)
        layers = nn.scan(
            _remat(Layer, c.remat),
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=c.num_layers,
            unroll=c.layer_unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = layers(c, self.adapter, self.dropout, name="layers")(x, real, angles)
        norm_init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
        x = ops.rms_norm(x, self.param("final_norm", norm_init, (c.hidden_size,), jnp.float32), c.rms_norm_eps)
        # The head acts on each position alone, so shifting what it reads shifts the logits (position 0 keeps its own).
        return jnp.concatenate([x[:, :1], x[:, :-1]], axis=1) if c.next_token_logits else x


def _init(config: DenoiserConfig, key: jax.Array) -> Any:
    return Denoiser(config).init(key, jnp.zeros((1, 2), jnp.int32), None)["params"]


def init_base(config: DenoiserConfig, key: jax.Array) -> dict:
    """Random float32 base parameters: normal kernels of standard deviation `in^-0.5`, norms of one."""
    return jax.jit(lambda key: nn.meta.unbox(_init(config, key)))(key)


def logical_axes(config: DenoiserConfig, lora: LoRA | None = None) -> Any:
    """Logical axis names of every parameter, as tuples in the structure of the base (or of the adapter's weights)."""
    if lora is not None:
        rank = lambda other: "lora_rank" if other == "embed" else "lora_rank_split"  # noqa: E731
        sides = {target: KERNEL_AXES[target] for target in lora.targets}
        return {
            "layers": {
                target: {"a": ("layers", into, rank(into)), "b": ("layers", rank(out), out)}
                for target, (into, out) in sides.items()
            }
        }
    boxed = jax.eval_shape(functools.partial(_init, config), jax.random.key(0))
    return jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))


def real_tokens(prompt_mask: Array | None, batch: int, length: int) -> Array | None:
    """`[B, T]` bool, True on real tokens, from a mask of the first `P` (or all `T`) positions; the rest is real."""
    if prompt_mask is None:
        return None
    missing = length - prompt_mask.shape[1]
    if missing < 0:
        raise UserError(f"prompt mask of length {prompt_mask.shape[1]} is longer than the {length} tokens")
    return jnp.concatenate([prompt_mask.astype(bool), jnp.ones((batch, missing), bool)], axis=1)


def hidden_states(
    config: DenoiserConfig,
    base: Any,
    lora: LoRA | None,
    tokens: Int[Array, "B T"],
    *,
    prompt_mask: Bool[Array, "B P"] | None = None,
    dropout_key: Array | None = None,
) -> Float[Array, "B T D"]:
    """Target-aligned hidden states after the final norm: index `i` predicts token `i`, for every family.

    Args:
      config: the denoiser; its `dtype` is the compute dtype and that of the result.
      base: parameters as `init_base` or the hub's loader gives them, in any float dtype.
      lora: an adapter, or None for the base alone (the reference policy).
      tokens: `[B, T]` ids, mask ids where a token is to be predicted.
      prompt_mask: `[B, P]` or `[B, T]`, True on real tokens; pads are never attended to. None: all are real.
      dropout_key: switches the adapter's dropout on.
    """
    real = real_tokens(prompt_mask, *tokens.shape)
    variables = {"params": base}
    adapter = None
    if lora is not None:
        variables["lora"] = lora.weights
        adapter = lora.replace(weights=None)
    model = Denoiser(config, adapter, dropout=dropout_key is not None)
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    return model.apply(variables, tokens, real, rngs=rngs)


def head_weights(config: DenoiserConfig, base: Any) -> Float[Array, "V D"]:
    """The rows of the output head; the embedding itself where the two are tied."""
    return base["embedding"] if config.tied_head else base["head"]


def logits_from_hidden(config: DenoiserConfig, base: Any, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Logits in float32 over the whole vocabulary."""
    head = head_weights(config, base).astype(hidden.dtype)
    return jnp.einsum(
        "...d,vd->...v", hidden, head, precision=_precision(config), preferred_element_type=jnp.float32
    )


def denoise(
    config: DenoiserConfig,
    base: Any,
    lora: LoRA | None,
    tokens: Int[Array, "B T"],
    *,
    prompt_mask: Bool[Array, "B P"] | None = None,
    dropout_key: Array | None = None,
) -> Float[Array, "B T V"]:
    """Target-aligned float32 logits `[B, T, V]`; arguments as for `hidden_states`.

    Training and sampling never call this: they put the head only where it is read.
    """
    hidden = hidden_states(config, base, lora, tokens, prompt_mask=prompt_mask, dropout_key=dropout_key)
    return constrain(logits_from_hidden(config, base, hidden), ("rows", "tokens", "vocab"))
