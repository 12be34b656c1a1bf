"""Turns an autoregressive checkpoint into one of a masked denoiser with the same tensors, if a family supports that."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path

import jax.numpy as jnp

from gdsd_jax.families import FAMILIES, Family
from gdsd_jax.hub.declared import declared
from gdsd_jax.hub.files import checked_directory, on_disk, read_json
from gdsd_jax.hub.load import load_checkpoint
from gdsd_jax.hub.save import export_checkpoint
from gdsd_jax.runtime.errors import UserError

_ROWS = 64  # an embedding that has to grow gets a multiple of this many rows
_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*")
_NOT_COPIED = ("config.json", "model.safetensors.index.json")


def family_for(directory: str | os.PathLike) -> Family | None:
    """Returns the family that can start from this autoregressive checkpoint, or None if no family can."""
    model_type = read_json(checked_directory(directory) / "config.json").get("model_type")
    return next((f for f in FAMILIES.values() if f.autoregressive and f.autoregressive == model_type), None)


def adapt(source: str | os.PathLike, directory: str | os.PathLike) -> None:
    """Writes an autoregressive checkpoint as a masked denoiser of its family, with a mask token.

    Tensors are copied. If the tokenizer lacks a mask token, one is added to it: the embedding and the head get more
    rows where they have none for the new token, and its row is the mean of the stored rows.

    Args:
      source: the directory of the autoregressive checkpoint.
      directory: where the new checkpoint is written; it must be absent or empty.

    Raises:
      UserError: no family can start from the checkpoint, or the checkpoint does not load.
    """
    import transformers

    source = checked_directory(source)
    family = family_for(source)
    if family is None:
        raise UserError(f"{source} is not an autoregressive checkpoint that a family can use: load it as it is")
    hf = read_json(source / "config.json") | {"model_type": family.model_type}
    known = declared(source, {"model_type": family.model_type}).get("mask_token_id")
    with tempfile.TemporaryDirectory() as folder, on_disk(source, _FILES) as files:
        if known is None:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                files, config=transformers.PretrainedConfig(), trust_remote_code=False, local_files_only=True
            )
            tokenizer.add_special_tokens({"mask_token": family.tokens["mask_token_id"]})
            tokenizer.save_pretrained(folder)
        else:
            for pattern in _FILES:
                for path in Path(files).glob(pattern):
                    if path.name not in _NOT_COPIED:
                        (Path(folder) / path.name).write_bytes(path.read_bytes())
        mask = tokenizer.mask_token_id if known is None else known
        rows = hf["vocab_size"]
        grown = rows if mask < rows else -(-(mask + 1) // _ROWS) * _ROWS
        stored = {"model_type": family.model_type, "mask_token_id": min(mask, rows - 1)}
        config, base = load_checkpoint(source, overrides=stored)
        for name in ("embedding", "head"):
            if known is None and name in base:
                table = base[name]
                mean = jnp.mean(table.astype(jnp.float32), axis=0).astype(table.dtype)
                base[name] = jnp.pad(table, ((0, grown - rows), (0, 0))).at[mask].set(mean)
        hf = {key: value for key, value in hf.items() if key != "auto_map"}
        hf |= {"architectures": family.write(config)["architectures"], "mask_token_id": mask, "vocab_size": grown}
        (Path(folder) / "config.json").write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")
        config = dataclasses.replace(config, mask_token_id=mask, vocab_size=grown)
        export_checkpoint(directory, config, base, source=folder)
