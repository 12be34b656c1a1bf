"""a2d-qwen3 and a2d-qwen2 (dllm): causal Qwen models turned into masked denoisers, with full or block-causal attention.

The tensors are those of the causal models; only the causal mask is dropped. The mask token is an added token of the
tokenizer.
"""

from __future__ import annotations

from typing import Any

from gdsd_jax.denoiser import DenoiserConfig
from gdsd_jax.families import decoder
from gdsd_jax.families.family import Family

# If a run asks for blocks (config.checkpoint_overrides.block_size), the first block begins with the completion.
_BLOCKS = {"block_origin": "column", "blind_pads": True}
QUIRKS = {"a2d-qwen2": {"qkv_bias": True} | _BLOCKS, "a2d-qwen3": {"qk_norm": True} | _BLOCKS}
_CODER_05B = {"hidden_size": 896, "num_layers": 24, "num_heads": 14, "num_kv_heads": 2, "intermediate_size": 4864}
_QWEN3_06B = {"hidden_size": 1024, "num_layers": 28, "num_heads": 16, "num_kv_heads": 8, "intermediate_size": 3072}
_CODER_05B |= {"max_length": 32768, "mask_token_id": 151665}
_QWEN3_06B |= {"max_length": 40960, "mask_token_id": 151669, "head_size": 128}


def _published(family: str, sizes: dict[str, Any], **changes: Any) -> DenoiserConfig:
    fields = {"qkv_bias": False, "next_token_logits": False} | QUIRKS[family] | sizes | changes
    return DenoiserConfig(
        family=family,
        vocab_size=151936,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tied_head=True,
        eos_token_id=151645,
        pad_token_id=151643,
        **fields,
    )


def _family(name: str, kind: str, repository: str, published: dict[str, DenoiserConfig]) -> Family:
    quirks = QUIRKS[name]
    architecture = f"A2D{kind}LMHeadModel"

    def write(config: DenoiserConfig) -> dict[str, Any]:
        # The class is part of the package dllm, not of the hub repository.
        hf = decoder.write(config, name, repository, {"AutoModel": architecture})
        del hf["auto_map"]
        return hf

    return Family(
        name=name,
        model_type=name,
        repository=repository,
        rows=decoder.ROWS,
        read=lambda hf: decoder.read(hf, name, quirks),
        write=write,
        quirks=quirks,
        tokens={"mask_token_id": "<|mask|>", "eos_token_id": "<|im_end|>", "pad_token_id": "<|endoftext|>"},
        sampler={"strategy": "mdlm", "block_length": 32},
        published=published,
        autoregressive=kind.lower(),
    )


FAMILIES = (
    _family(
        "a2d-qwen3",
        "Qwen3",
        "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1",
        {
            "Qwen3-0.6B-diffusion-mdlm-v0.1": _published("a2d-qwen3", _QWEN3_06B),
            "Qwen3-0.6B-diffusion-bd3lm-v0.1": _published("a2d-qwen3", _QWEN3_06B, block_size=32),
        },
    ),
    _family(
        "a2d-qwen2",
        "Qwen2",
        "dllm-hub/Qwen2.5-Coder-0.5B-Instruct-diffusion-mdlm-v0.1",
        {
            "Qwen2.5-Coder-0.5B-Instruct-diffusion-mdlm-v0.1": _published("a2d-qwen2", _CODER_05B),
            "Qwen2.5-Coder-0.5B-Instruct-diffusion-bd3lm-v0.1": _published("a2d-qwen2", _CODER_05B, block_size=32),
        },
    ),
)
