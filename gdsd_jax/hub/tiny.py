"""Makes a complete small checkpoint: random weights, `config.json`, a tokenizer of characters, and a chat template.

With such a checkpoint every command runs without a network, and training from scratch has a starting point.
"""

from __future__ import annotations

import json
import os
import string
import tempfile
from pathlib import Path
from typing import Any

import jax

from gdsd_jax import families
from gdsd_jax.denoiser import DenoiserConfig, init_base
from gdsd_jax.hub import names
from gdsd_jax.hub.save import export_checkpoint
from gdsd_jax.runtime import memory

SPECIAL = {
    "pad_token": "<|pad|>",
    "bos_token": "<|bos|>",
    "eos_token": "<|eos|>",
    "unk_token": "<|unk|>",
    "mask_token": "<|mask|>",
}
TURNS = ("<|eot|>", "<|system|>", "<|user|>", "<|assistant|>")
TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"

# Each turn begins with one token, and only answers are closed, so a prompt has two tokens more than its content.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|eot|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> Any:
    """Makes a tokenizer with one id for each printable ASCII character, newline, answer tag and special token.

    Any other character becomes the unknown token.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate((*SPECIAL.values(), *TURNS, *TAGS, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (*SPECIAL.values(), *TURNS)])
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=list(TURNS),
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **SPECIAL,
    )


def build(
    directory: str | os.PathLike,
    *,
    family: str = "llada",
    hidden_size: int = 128,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int | None = None,
    intermediate_size: int = 384,
    max_length: int = 1024,
    block_size: int | None = None,
    seed: int = 0,
) -> None:
    """Writes a small random checkpoint in the layout of a model family, float32.

    The embedding has a multiple of 64 rows (128), more than the tokenizer has ids.

    Args:
      directory: where the checkpoint is written; it must be absent or empty.
      family: name of a family, a key of `gdsd_jax.families.FAMILIES`.
      num_kv_heads: None for as many as `num_heads`.
      block_size: tokens per block of block-causal attention; None for the family's own, which may be full attention.
      seed: seed of the random weights.

    Raises:
      UserError: sizes do not divide, the family is unknown, or the directory is not empty.
    """
    sizes = hidden_size * (4 * hidden_size + 3 * intermediate_size)
    memory.require(4 * num_layers * sizes, memory.of_host(), f"a model of {num_layers} layers", "config.tiny's sizes")
    tokenizer = make_tokenizer()
    quirks = dict(families.family_named(family).quirks)
    if block_size is not None:
        quirks["block_size"] = block_size
    config = DenoiserConfig(
        family=family,
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads or num_heads,
        intermediate_size=intermediate_size,
        max_length=max_length,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tied_head=False,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **({"qkv_bias": False, "next_token_logits": False} | quirks),
    )
    hf = names.hf_config(config)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        (source / "config.json").write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")
        ids = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
        (source / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(str(source))
        (source / "README.md").write_text(_CARD.format(model=hf["model_type"], seed=seed), encoding="utf-8")
        base = jax.jit(init_base, static_argnums=0)(config, jax.random.key(seed))
        export_checkpoint(directory, config, base, source=source)


_CARD = """# A tiny masked denoiser

Random weights (seed {seed}) in the layout of a {model} checkpoint, with a tokenizer of single characters; made by \
`gdsd_jax.hub.tiny.build` to try things out. It knows nothing until it is trained.
"""
