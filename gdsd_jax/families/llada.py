"""LLaDA-8B and LLaDA-1.5 (arXiv 2502.09992, 2505.19223): full attention, tensors named as in OLMo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gdsd_jax.denoiser import DenoiserConfig
from gdsd_jax.families.family import Family, Row, refuse, rope_theta

REPOSITORY = "GSAI-ML/LLaDA-8B-Instruct"
CLASSES = {"AutoConfig": "configuration_llada.LLaDAConfig"}
CLASSES |= dict.fromkeys(("AutoModel", "AutoModelForCausalLM"), "modeling_llada.LLaDAModelLM")
BLOCK = "model.transformer.blocks.{n}."
PROJECTIONS = {"q": "Q", "k": "K", "v": "K"}
ROWS = (
    Row("model.transformer.wte.weight", ("embedding",), "VD"),
    Row("model.transformer.ln_f.weight", ("final_norm",), "D"),
    Row("model.transformer.ff_out.weight", ("head",), "VD"),
    Row(BLOCK + "attn_norm.weight", ("layers", "attn_norm"), "D"),
    Row(BLOCK + "ff_norm.weight", ("layers", "mlp_norm"), "D"),
    *(Row(f"{BLOCK}{x}_proj.weight", ("layers", x, "weight"), f"{out}D") for x, out in PROJECTIONS.items()),
    *(Row(f"{BLOCK}{x}_proj.bias", ("layers", x, "bias"), out) for x, out in PROJECTIONS.items()),
    Row(BLOCK + "attn_out.weight", ("layers", "o", "weight"), "DQ"),
    Row(BLOCK + "ff_proj.weight", ("layers", "gate", "weight"), "FD"),
    Row(BLOCK + "up_proj.weight", ("layers", "up", "weight"), "FD"),
    Row(BLOCK + "ff_out.weight", ("layers", "down", "weight"), "DF"),
)

# Options with the only values that are computed here, of which the first is written.
ABSENT = ("alibi", "attention_layer_norm", "include_bias", "input_emb_norm", "scale_logits")
FIXED = dict.fromkeys(ABSENT, (False,)) | {
    "activation_type": ("silu",),
    "bias_for_layer_norm": (False, None),
    "block_group_size": (1,),
    "block_type": ("llama",),
    "layer_norm_type": ("rms",),
    "multi_query_attention": (None, False),
    "rope": (True,),
}
# Key of config.json -> field of DenoiserConfig, for the required keys that are read as they are.
KEYS = {name: name for name in ("mask_token_id", "eos_token_id", "pad_token_id")} | {
    "d_model": "hidden_size",
    "max_sequence_length": "max_length",
    "n_heads": "num_heads",
    "n_layers": "num_layers",
}


def read(hf: Mapping[str, Any], family: str = "llada") -> DenoiserConfig:
    """Reads a `config.json` in LLaDA's keys."""
    refuse(hf, FIXED | {"clip_qkv": (None,)})
    return DenoiserConfig(
        family=family,
        vocab_size=hf.get("embedding_size") or hf["vocab_size"],
        num_kv_heads=hf.get("n_kv_heads") or hf["n_heads"],
        intermediate_size=hf.get("mlp_hidden_size") or hf["mlp_ratio"] * hf["d_model"],
        rope_theta=rope_theta(hf),
        rms_norm_eps=float(hf["rms_norm_eps"]),
        qkv_bias=bool(hf.get("include_qkv_bias", False)),
        tied_head=bool(hf.get("weight_tying", False)),
        next_token_logits=False,
        **{field: hf[key] for key, field in KEYS.items()},
    )


def write(config: DenoiserConfig) -> dict[str, Any]:
    """Writes a complete `config.json` in LLaDA's keys."""
    written = dict.fromkeys(("attention_dropout", "embedding_dropout", "residual_dropout"), 0.0) | {
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_layer_norm_with_affine": True,
        "auto_map": {name: f"{REPOSITORY}--{path}" for name, path in CLASSES.items()},
        "embedding_size": config.vocab_size,
        "flash_attention": False,
        "include_qkv_bias": config.qkv_bias,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "layer_norm_with_affine": True,
        "mlp_hidden_size": config.intermediate_size,
        "mlp_ratio": 4,
        "model_type": "llada",
        "n_kv_heads": config.num_kv_heads,
        "precision": "amp_bf16",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_full_precision": True,
        "rope_theta": config.rope_theta,
        "transformers_version": "4.46.3",
        "use_cache": False,
        "vocab_size": config.vocab_size,
        "weight_tying": config.tied_head,
    }
    written |= {key: allowed[0] for key, allowed in FIXED.items()}
    return dict(sorted((written | {key: getattr(config, field) for key, field in KEYS.items()}).items()))


_SIZES = {"vocab_size": 126464, "hidden_size": 4096, "num_layers": 32, "num_heads": 32, "num_kv_heads": 32}
_SIZES |= {"intermediate_size": 12288, "max_length": 4096}
_IDS = {"mask_token_id": 126336, "eos_token_id": 126081, "pad_token_id": 126081}
_QUIRKS = {"qkv_bias": False, "tied_head": False, "next_token_logits": False}
LLADA_8B = DenoiserConfig("llada", rope_theta=500000.0, rms_norm_eps=1e-5, **_SIZES, **_IDS, **_QUIRKS)
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
