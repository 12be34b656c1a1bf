"""Sizes of the published models, by the name of their directory: what is known before a checkpoint is there."""

from __future__ import annotations

import os
from pathlib import Path

from gdsd_jax.denoiser import DenoiserConfig
from gdsd_jax.errors import UserError
from gdsd_jax.hub.load import read_json

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
DREAM_7B = DenoiserConfig(
    family="dream",
    vocab_size=152064,
    hidden_size=3584,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    intermediate_size=18944,
    max_length=131072,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
    qkv_bias=True,
    tied_head=False,
    next_token_logits=True,
    mask_token_id=151666,
    eos_token_id=151643,
    pad_token_id=151643,
)
PUBLISHED = {
    "LLaDA-8B-Instruct": LLADA_8B,
    "LLaDA-8B-Base": LLADA_8B,
    "LLaDA-1.5": LLADA_8B,
    "Dream-v0-Instruct-7B": DREAM_7B,
    "Dream-v0-Base-7B": DREAM_7B,
}


def architecture(directory: str | os.PathLike) -> DenoiserConfig:
    """The sizes of a checkpoint: from its `config.json`, or for a published model that is not there from its name.

    Raises:
      UserError: there is no such directory and its last part is not the name of a published model.
    """
    directory = Path(directory)
    if (directory / "config.json").is_file():
        return DenoiserConfig.from_hf(read_json(directory / "config.json"))
    if directory.name not in PUBLISHED:
        raise UserError(
            f"config.checkpoint {directory} is not there, and {directory.name!r} is no published model whose sizes are "
            f"known ({', '.join(PUBLISHED)})"
        )
    return PUBLISHED[directory.name]
