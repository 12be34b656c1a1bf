"""LLaDA-8B and LLaDA-1.5 (arXiv 2502.09992, 2505.19223): full attention, tensors named as in OLMo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gdsd_jax.denoiser import DenoiserConfig
from gdsd_jax.families.family import Family, Row, refuse, rope_theta

REPOSITORY = "GSAI-ML/LLaDA-8B-Instruct"
ROWS = (
    Row("model.transformer.wte.weight", ("embedding",), "VD"),
    Row("model.transformer.ln_f.weight", ("final_norm",), "D"),
    Row("model.transformer.ff_out.weight", ("head",), "VD"),
    Row("model.transformer.blocks.{n}.attn_norm.weight", ("layers", "attn_norm"), "D"),
    Row("model.transformer.blocks.{n}.ff_norm.weight", ("layers", "mlp_norm"), "D"),
    Row("model.transformer.blocks.{n}.q_proj.weight", ("layers", "q", "kernel"), "QD"),
    Row("model.transformer.blocks.{n}.q_proj.bias", ("layers", "q", "bias"), "Q"),
    Row("model.transformer.blocks.{n}.k_proj.weight", ("layers", "k", "kernel"), "KD"),
    Row("model.transformer.blocks.{n}.k_proj.bias", ("layers", "k", "bias"), "K"),
    Row("model.transformer.blocks.{n}.v_proj.weight", ("layers", "v", "kernel"), "KD"),
    Row("model.transformer.blocks.{n}.v_proj.bias", ("layers", "v", "bias"), "K"),
    Row("model.transformer.blocks.{n}.attn_out.weight", ("layers", "o", "kernel"), "DQ"),
    Row("model.transformer.blocks.{n}.ff_proj.weight", ("layers", "gate", "kernel"), "FD"),
    Row("model.transformer.blocks.{n}.up_proj.weight", ("layers", "up", "kernel"), "FD"),
    Row("model.transformer.blocks.{n}.ff_out.weight", ("layers", "down", "kernel"), "DF"),
)

# Options with the only values that are computed here, of which the first is written.
FIXED = {
    "activation_type": ("silu",),
    "alibi": (False,),
    "attention_layer_norm": (False,),
    "bias_for_layer_norm": (False, None),
    "block_group_size": (1,),
    "block_type": ("llama",),
    "include_bias": (False,),
    "input_emb_norm": (False,),
    "layer_norm_type": ("rms",),
    "multi_query_attention": (None, False),
    "rope": (True,),
    "scale_logits": (False,),
}


def read(hf: Mapping[str, Any], family: str = "llada") -> DenoiserConfig:
    """Reads a `config.json` in LLaDA's keys."""
    refuse(hf, FIXED | {"clip_qkv": (None,)})
    heads = hf["n_heads"]
    return DenoiserConfig(
        family=family,
        vocab_size=hf.get("embedding_size") or hf["vocab_size"],
        hidden_size=hf["d_model"],
        num_layers=hf["n_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("n_kv_heads") or heads,
        intermediate_size=hf.get("mlp_hidden_size") or hf["mlp_ratio"] * hf["d_model"],
        max_length=hf["max_sequence_length"],
        rope_theta=rope_theta(hf),
        rms_norm_eps=float(hf["rms_norm_eps"]),
        qkv_bias=bool(hf.get("include_qkv_bias", False)),
        tied_head=bool(hf.get("weight_tying", False)),
        next_token_logits=False,
        mask_token_id=hf["mask_token_id"],
        eos_token_id=hf["eos_token_id"],
        pad_token_id=hf["pad_token_id"],
    )


def write(config: DenoiserConfig) -> dict[str, Any]:
    """Writes a complete `config.json` in LLaDA's keys."""
    written = {
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm_with_affine": True,
        "auto_map": {
            "AutoConfig": f"{REPOSITORY}--configuration_llada.LLaDAConfig",
            "AutoModel": f"{REPOSITORY}--modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": f"{REPOSITORY}--modeling_llada.LLaDAModelLM",
        },
        "d_model": config.hidden_size,
        "embedding_dropout": 0.0,
        "embedding_size": config.vocab_size,
        "eos_token_id": config.eos_token_id,
        "flash_attention": False,
        "include_qkv_bias": config.qkv_bias,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "layer_norm_with_affine": True,
        "mask_token_id": config.mask_token_id,
        "max_sequence_length": config.max_length,
        "mlp_hidden_size": config.intermediate_size,
        "mlp_ratio": 4,
        "model_type": "llada",
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "n_layers": config.num_layers,
        "pad_token_id": config.pad_token_id,
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_full_precision": True,
        "rope_theta": config.rope_theta,
        "transformers_version": "4.46.3",
        "use_cache": False,
        "vocab_size": config.vocab_size,
        "weight_tying": config.tied_head,
    }
    return dict(sorted(({key: allowed[0] for key, allowed in FIXED.items()} | written).items()))


LLADA_8B = DenoiserConfig(
    family="llada",
    vocab_size=126464,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    intermediate_size=12288,
    max_length=4096,
    rope_theta=500000.0,
    rms_norm_eps=1e-5,
    qkv_bias=False,
    tied_head=False,
    next_token_logits=False,
    mask_token_id=126336,
    eos_token_id=126081,
    pad_token_id=126081,
)
FAMILIES = (
    Family(
        name="llada",
        model_type="llada",
        repository=REPOSITORY,
        rows=ROWS,
        read=read,
        write=write,
        sampler={"strategy": "low_confidence", "block_length": 32},
        published=dict.fromkeys(("LLaDA-8B-Instruct", "LLaDA-8B-Base", "LLaDA-1.5"), LLADA_8B),
    ),
)
