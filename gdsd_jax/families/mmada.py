"""MMaDA-8B, the text part: LLaDA's layers and names; in the embedding, the codes of images follow the words."""

from __future__ import annotations

import dataclasses
from typing import Any

from gdsd_jax.denoiser import DenoiserConfig
from gdsd_jax.families import llada

REPOSITORY = "Gen-Verse/MMaDA-8B-MixCoT"
IMAGE_CODES = 8192


def write(config: DenoiserConfig) -> dict[str, Any]:
    """Writes a complete `config.json` with LLaDA's keys and the sizes of the vocabularies."""
    classes = {"AutoConfig": "MMadaConfig", "AutoModel": "MMadaModelLM", "AutoModelForCausalLM": "MMadaModelLM"}
    return llada.write(config) | {
        "architectures": ["MMadaModelLM"],
        "auto_map": {key: f"{REPOSITORY}--modeling_mmada.{name}" for key, name in classes.items()},
        "codebook_size": 0,
        "llm_vocab_size": config.vocab_size,
        "model_type": "mmada",
        "new_vocab_size": config.vocab_size,
        "num_new_special_tokens": 0,
        "num_vq_tokens": 0,
    }


MMADA_8B = dataclasses.replace(llada.LLADA_8B, family="mmada", vocab_size=llada.LLADA_8B.vocab_size + IMAGE_CODES)
FAMILIES = (
    dataclasses.replace(
        llada.FAMILIES[0],
        name="mmada",
        model_type="mmada",
        repository=REPOSITORY,
        read=lambda hf: llada.read(hf, "mmada"),
        write=write,
        tokens={"mask_token_id": "<|mdm_mask|>"},
        published=dict.fromkeys(("MMaDA-8B-Base", "MMaDA-8B-MixCoT"), MMADA_8B),
    ),
)
