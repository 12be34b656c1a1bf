"""Defines the configuration keys and tensor names of Llama, which most families share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gdsd_jax.denoiser import DenoiserConfig
from gdsd_jax.families.family import Row, refuse, rope_theta

ROWS = (
    Row("model.embed_tokens.weight", ("embedding",), "VD"),
    Row("model.norm.weight", ("final_norm",), "D"),
    Row("lm_head.weight", ("head",), "VD"),
    Row("model.layers.{n}.input_layernorm.weight", ("layers", "attn_norm"), "D"),
    Row("model.layers.{n}.post_attention_layernorm.weight", ("layers", "mlp_norm"), "D"),
    Row("model.layers.{n}.self_attn.q_proj.weight", ("layers", "q", "weight"), "QD"),
    Row("model.layers.{n}.self_attn.q_proj.bias", ("layers", "q", "bias"), "Q"),
    Row("model.layers.{n}.self_attn.q_norm.weight", ("layers", "q_norm"), "H"),
    Row("model.layers.{n}.self_attn.k_proj.weight", ("layers", "k", "weight"), "KD"),
    Row("model.layers.{n}.self_attn.k_proj.bias", ("layers", "k", "bias"), "K"),
    Row("model.layers.{n}.self_attn.k_norm.weight", ("layers", "k_norm"), "H"),
    Row("model.layers.{n}.self_attn.v_proj.weight", ("layers", "v", "weight"), "KD"),
    Row("model.layers.{n}.self_attn.v_proj.bias", ("layers", "v", "bias"), "K"),
    Row("model.layers.{n}.self_attn.o_proj.weight", ("layers", "o", "weight"), "DQ"),
    Row("model.layers.{n}.mlp.gate_proj.weight", ("layers", "gate", "weight"), "FD"),
    Row("model.layers.{n}.mlp.up_proj.weight", ("layers", "up", "weight"), "FD"),
    Row("model.layers.{n}.mlp.down_proj.weight", ("layers", "down", "weight"), "DF"),
)


_QWEN3_HEAD = 128  # the default of the class if config.json has no such key


def read(hf: Mapping[str, Any], family: str, quirks: Mapping[str, Any]) -> DenoiserConfig:
    """Reads a `config.json` in Llama's keys; `quirks` are the family's own fields of `DenoiserConfig`.

    If no pad id is declared, the EOS id is used instead, since pads are never attended to.

    Raises:
      UserError: `config.json` sets an option that this denoiser does not compute.
      KeyError: a required key is absent.
    """
    refuse(
        hf,
        {
            "hidden_act": ("silu", "swish"),
            "num_experts": (None, 0),
            "use_sliding_window": (False, None),
            "mlp_bias": (False,),
            # Qwen2 ignores this key and always has biases; in the other models the key would add them.
            "attention_bias": (bool(quirks.get("qkv_bias")), False),
            "partial_rotary_factor": (1, None),
        },
    )
    if set(hf.get("layer_types") or ()) - {"full_attention"}:
        refuse(hf, {"layer_types": ("full_attention in every layer",)})
    heads, hidden = hf["num_attention_heads"], hf["hidden_size"]
    size = hf.get("head_dim", _QWEN3_HEAD if quirks.get("qk_norm") else None)
    eos = hf["eos_token_id"]
    fields = {
        "head_size": None if size is None or size * heads == hidden else size,
        "qkv_bias": False,
        "next_token_logits": False,
        "tied_head": bool(hf.get("tie_word_embeddings", False)),
        "mask_token_id": hf["mask_token_id"],
        "eos_token_id": eos,
        "pad_token_id": eos if hf.get("pad_token_id") is None else hf["pad_token_id"],
        "block_size": hf.get("block_size"),
    }
    return DenoiserConfig(
        family=family,
        vocab_size=hf["vocab_size"],
        hidden_size=hidden,
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        intermediate_size=hf["intermediate_size"],
        max_length=hf["max_position_embeddings"],
        rope_theta=rope_theta(hf),
        rms_norm_eps=float(hf["rms_norm_eps"]),
        **(fields | quirks),
    )


def write(config: DenoiserConfig, model_type: str, repository: str, classes: Mapping[str, str]) -> dict[str, Any]:
    """Writes a complete `config.json` in Llama's keys.

    Args:
      classes: the value of `auto_map`: class of transformers -> `module.Class` in the repository.
    """
    architecture = classes.get("AutoModelForCausalLM") or classes["AutoModel"]
    return {
        "architectures": [architecture.rpartition(".")[2]],
        **({} if config.qkv_bias else {"attention_bias": False}),
        "attention_dropout": 0.0,
        "auto_map": {name: f"{repository}--{path}" for name, path in classes.items()},
        **({} if config.block_size is None else {"block_size": config.block_size}),
        "bos_token_id": config.eos_token_id,
        "eos_token_id": config.eos_token_id,
        # Without the key, Qwen3's class would use its own default.
        **({"head_dim": config.head_dim} if config.head_size or config.qk_norm else {}),
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "mask_token_id": config.mask_token_id,
        "max_position_embeddings": config.max_length,
        "max_window_layers": config.num_layers,
        "model_type": model_type,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "pad_token_id": config.pad_token_id,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": config.tied_head,
        "transformers_version": "4.57.0",
        "use_cache": False,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }
