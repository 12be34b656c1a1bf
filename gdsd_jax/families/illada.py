"""iLLaDA-8B: a masked denoiser in Llama's names, with grouped heads and a tied embedding.

No file of the checkpoint declares the mask id; only the authors' README gives it (5).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gdsd_jax.denoiser import DenoiserConfig
from gdsd_jax.families import decoder
from gdsd_jax.families.family import Family, refuse

REPOSITORY = "GSAI-ML/iLLaDA-8B-Instruct"
CLASSES = {
    "AutoConfig": "configuration_illada.ILLaDAConfig",
    "AutoModel": "modeling_illada.ILLaDAForCausalLM",
    "AutoModelForCausalLM": "modeling_illada.ILLaDAForCausalLM",
}


def read(hf: Mapping[str, Any]) -> DenoiserConfig:
    """Reads a `config.json`; refuses `layer_norm_eps`, which would replace every RMSNorm by a LayerNorm."""
    refuse(hf, {"layer_norm_eps": (None,)})
    return decoder.read(hf, "illada", {})


def write(config: DenoiserConfig) -> dict[str, Any]:
    """Writes a complete `config.json`."""
    return decoder.write(config, "illada", REPOSITORY, CLASSES) | {"layer_norm_eps": None, "mlp_bias": False}


# Theta and epsilon of the published checkpoint are not confirmed; planning needs only the sizes.
ILLADA_8B = DenoiserConfig(
    family="illada",
    vocab_size=155136,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    intermediate_size=14336,
    max_length=8192,
    rope_theta=500000.0,
    rms_norm_eps=1e-5,
    qkv_bias=False,
    tied_head=True,
    next_token_logits=False,
    mask_token_id=5,
    eos_token_id=2,
    pad_token_id=1,
)
FAMILIES = (
    Family(
        name="illada",
        model_type="illada",
        repository=REPOSITORY,
        rows=decoder.ROWS,
        read=read,
        write=write,
        tokens={"mask_token_id": "<[MASK]>"},
        sampler={"strategy": "low_confidence", "block_length": 32},
        published={"iLLaDA-8B-Instruct": ILLADA_8B, "iLLaDA-8B-Base": ILLADA_8B},
    ),
)
