"""What a masked denoiser is: sizes, token ids and the quirks of its family, read from a checkpoint's `config.json`.

Two families are known. Both are Llama-like decoder blocks under full attention; they differ in how their configuration
names things, in biases, in grouped heads, and in whether the logits at position `i` speak of token `i` or of `i + 1`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from gdsd_jax.errors import UserError

REMAT_POLICIES = ("none", "full", "dots")
COMPUTE_DTYPES = ("float32", "bfloat16")
ATTENTION = ("auto", "plain", "splash")


@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
    """Sizes, ids and numerics of a denoiser. Hashable, so it can be a static argument of a compiled function.

    Attributes:
      family: key of the name table in `gdsd_jax.hub`; nothing else reads it.
      vocab_size: rows of the embedding and of the head.
      next_token_logits: the raw logits at position `i` predict token `i + 1`. The denoiser shifts them, so that
        everything above it sees target-aligned logits.
      mask_token_id, eos_token_id, pad_token_id: always those of the checkpoint.
      dtype: compute dtype of activations and matmuls, "float32" or "bfloat16". Norms, RoPE, softmax and
        log-normalisers are float32 in either case, and "float32" asks for full-precision matmuls on every platform.
      remat: what the backward pass recomputes: "none" keeps everything, "dots" keeps matmul outputs, "full" keeps
        only the residual stream between layers.
      attention: "plain" is `ops.attention`, "splash" the TPU kernel, "auto" what fits the devices: see
        `gdsd_jax.denoiser.splash.chosen`.
      layer_unroll: layers per iteration of the scan over layers. 1 compiles fastest and is right for deep models;
        `num_layers` removes the loop, which small models on a CPU like best.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    max_length: int
    rope_theta: float
    rms_norm_eps: float
    qkv_bias: bool
    tied_head: bool
    next_token_logits: bool
    mask_token_id: int
    eos_token_id: int
    pad_token_id: int
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"
    layer_unroll: int = 1

    def __post_init__(self):
        if self.dtype not in COMPUTE_DTYPES:
            raise UserError(f"compute dtype {self.dtype!r} is not one of {COMPUTE_DTYPES}: change config.model.dtype")
        if self.remat not in REMAT_POLICIES:
            raise UserError(f"remat policy {self.remat!r} is not one of {REMAT_POLICIES}: change config.model.remat")
        if self.attention not in ATTENTION:
            raise UserError(f"attention {self.attention!r} is not one of {ATTENTION}: change config.model.attention")
        if self.hidden_size % self.num_heads:
            raise UserError(f"hidden size {self.hidden_size} is not a multiple of the {self.num_heads} heads")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"{self.num_heads} heads are not a multiple of the {self.num_kv_heads} key/value heads")
        for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            if type(value) is not int:
                raise UserError(f"{name} in config.json is {value!r}: one whole number is needed")
            if not 0 <= value < self.vocab_size:
                raise UserError(f"{name} {value} lies outside the vocabulary of {self.vocab_size}: see config.json")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> DenoiserConfig:
        """Reads the mapping of a `config.json`.

        Raises:
          UserError: unknown `model_type`, an architecture option that this denoiser does not compute, a missing key.
        """
        model_type = hf.get("model_type")
        if model_type not in _READERS:
            raise UserError(
                f"unknown model_type {model_type!r} in config.json: this denoiser reads {', '.join(sorted(_READERS))}"
            )
        try:
            return _READERS[model_type](hf)
        except KeyError as error:
            raise UserError(f"config.json of model_type {model_type!r} lacks the key {error}") from None
        except UserError:
            raise
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise UserError(f"config.json of model_type {model_type!r} holds an unusable value: {error}") from None


def _refuse(hf: Mapping[str, Any], supported: Mapping[str, tuple]) -> None:
    """Raises if an option that changes the mathematics is set to something else than what we compute."""
    for key, allowed in supported.items():
        if key in hf and hf[key] not in allowed:
            raise UserError(f"config.json sets {key} to {hf[key]!r}; this denoiser computes only {allowed[0]!r}")


def _read_llada(hf: Mapping[str, Any]) -> DenoiserConfig:
    _refuse(
        hf,
        {
            "activation_type": ("silu",),
            "block_type": ("llama",),
            "layer_norm_type": ("rms",),
            "rope": (True,),
            "alibi": (False,),
            "include_bias": (False,),
            "bias_for_layer_norm": (False, None),
            "attention_layer_norm": (False,),
            "input_emb_norm": (False,),
            "scale_logits": (False,),
            "block_group_size": (1,),
            "multi_query_attention": (None, False),
        },
    )
    heads = hf["n_heads"]
    vocab_size = hf.get("embedding_size") or hf["vocab_size"]
    return DenoiserConfig(
        family="llada",
        vocab_size=vocab_size,
        hidden_size=hf["d_model"],
        num_layers=hf["n_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("n_kv_heads") or heads,
        intermediate_size=hf.get("mlp_hidden_size") or hf["mlp_ratio"] * hf["d_model"],
        max_length=hf["max_sequence_length"],
        rope_theta=float(hf["rope_theta"]),
        rms_norm_eps=float(hf["rms_norm_eps"]),
        qkv_bias=bool(hf.get("include_qkv_bias", False)),
        tied_head=bool(hf.get("weight_tying", False)),
        next_token_logits=False,
        mask_token_id=hf["mask_token_id"],
        eos_token_id=hf["eos_token_id"],
        pad_token_id=hf["pad_token_id"],
    )


def _read_dream(hf: Mapping[str, Any]) -> DenoiserConfig:
    plain = (None, {"rope_type": "default"}, {"type": "default"})
    _refuse(hf, {"hidden_act": ("silu",), "rope_scaling": plain, "use_sliding_window": (False,)})
    heads = hf["num_attention_heads"]
    return DenoiserConfig(
        family="dream",
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        intermediate_size=hf["intermediate_size"],
        max_length=hf["max_position_embeddings"],
        rope_theta=float(hf["rope_theta"]),
        rms_norm_eps=float(hf["rms_norm_eps"]),
        qkv_bias=True,
        tied_head=bool(hf.get("tie_word_embeddings", False)),
        next_token_logits=True,
        mask_token_id=hf["mask_token_id"],
        eos_token_id=hf["eos_token_id"],
        pad_token_id=hf["pad_token_id"],
    )


_READERS: dict[str, Callable[[Mapping[str, Any]], DenoiserConfig]] = {"llada": _read_llada, "Dream": _read_dream}
