"""SDAR and TraDo: Qwen3's layers under block-causal attention; text is written block by block (arXiv 2510.06303)."""

from __future__ import annotations

from typing import Any

from gdsd_jax.denoiser import DenoiserConfig
from gdsd_jax.families import decoder
from gdsd_jax.families.family import Family

REPOSITORY = "JetLM/SDAR-4B-Chat"
CLASSES = {
    "AutoConfig": "configuration_sdar.SDARConfig",
    "AutoModel": "modeling_sdar.SDARModel",
    "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
}
QUIRKS = {"qk_norm": True, "block_origin": "sequence"}
BLOCK_SIZE = 4  # if config.json gives none


def read(hf: Any) -> DenoiserConfig:
    """Reads a `config.json`."""
    return decoder.read({"block_size": BLOCK_SIZE} | dict(hf), "sdar", QUIRKS)


def write(config: DenoiserConfig) -> dict[str, Any]:
    """Writes a complete `config.json`."""
    return decoder.write(config, "sdar", REPOSITORY, CLASSES)


def _published(hidden_size: int, num_layers: int, num_heads: int, intermediate_size: int, tied: bool) -> DenoiserConfig:
    return DenoiserConfig(
        family="sdar",
        vocab_size=151936,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=8,
        intermediate_size=intermediate_size,
        max_length=40960,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        qkv_bias=False,
        tied_head=tied,
        next_token_logits=False,
        mask_token_id=151669,
        eos_token_id=151643,
        pad_token_id=151643,
        head_size=None if hidden_size == 128 * num_heads else 128,
        block_size=BLOCK_SIZE,
        **QUIRKS,
    )


SDAR_4B, SDAR_8B = _published(2560, 36, 32, 9728, False), _published(4096, 36, 32, 12288, False)
FAMILIES = (
    Family(
        name="sdar",
        model_type="sdar",
        repository=REPOSITORY,
        rows=decoder.ROWS,
        read=read,
        write=write,
        quirks=QUIRKS | {"block_size": BLOCK_SIZE},
        tokens={"mask_token_id": "<|MASK|>"},
        sampler={"strategy": "low_confidence", "block_length": BLOCK_SIZE, "threshold": 0.9},
        published={
            "SDAR-1.7B-Chat": _published(2048, 28, 16, 6144, True),
            "SDAR-4B-Chat": SDAR_4B,
            "SDAR-8B-Chat": SDAR_8B,
            "TraDo-4B-Instruct": SDAR_4B,
            "TraDo-8B-Instruct": SDAR_8B,
        },
    ),
)
