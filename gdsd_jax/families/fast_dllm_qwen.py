"""Fast-dLLM v2: Qwen2.5's layers under block-causal attention, with logits that predict the next token.

The first token of a block is predicted by the last token of the finished block before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gdsd_jax.denoiser import DenoiserConfig
from gdsd_jax.families import decoder
from gdsd_jax.families.family import Family

REPOSITORY = "Efficient-Large-Model/Fast_dLLM_v2_7B"
CLASSES = {
    "AutoConfig": "configuration.Fast_dLLM_QwenConfig",
    "AutoModel": "modeling.Fast_dLLM_QwenModel",
    "AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM",
}
QUIRKS = {"qkv_bias": True, "next_token_logits": True, "block_origin": "sequence"}
NAME, BLOCK_SIZE = "fast_dllm_qwen", 32


def read(hf: Mapping[str, Any]) -> DenoiserConfig:
    """Reads a `config.json`; `block_size` of config.checkpoint_overrides takes precedence over its `bd_size`."""
    return decoder.read({"block_size": hf.get("bd_size", BLOCK_SIZE)} | dict(hf), NAME, QUIRKS)


def write(config: DenoiserConfig) -> dict[str, Any]:
    """Writes a complete `config.json`."""
    hf = decoder.write(config, "Fast_dLLM_Qwen", REPOSITORY, CLASSES)
    return hf | {"bd_size": hf.pop("block_size")}


def _published(vocab_size: int, hidden_size: int, heads: int, kv: int, mlp: int, tied: bool) -> DenoiserConfig:
    return DenoiserConfig(
        family=NAME,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=28,
        num_heads=heads,
        num_kv_heads=kv,
        intermediate_size=mlp,
        max_length=32768,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tied_head=tied,
        mask_token_id=151665,
        eos_token_id=151645,
        pad_token_id=151645,
        block_size=BLOCK_SIZE,
        **QUIRKS,
    )


FAMILIES = (
    Family(
        name=NAME,
        model_type="Fast_dLLM_Qwen",
        repository=REPOSITORY,
        rows=decoder.ROWS,
        read=read,
        write=write,
        quirks=QUIRKS | {"block_size": BLOCK_SIZE},
        tokens={"mask_token_id": "|<MASK>|"},
        sampler={"strategy": "low_confidence", "block_length": 8, "threshold": 0.9, "lead": True},
        published={
            "Fast_dLLM_v2_7B": _published(152064, 3584, 28, 4, 18944, False),
            "Fast_dLLM_v2_1.5B": _published(151936, 1536, 12, 2, 8960, True),
        },
    ),
)
