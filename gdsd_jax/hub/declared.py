"""Reads the `config.json` of a checkpoint, and takes token ids that it lacks from the tokenizer's files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from gdsd_jax import families
from gdsd_jax.denoiser import DenoiserConfig
from gdsd_jax.hub.files import checked_directory, read_json
from gdsd_jax.runtime.files import understood


def declared(directory: str | os.PathLike, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns `config.json` as a mapping, with `overrides` applied and missing token ids from the tokenizer's files.

    Raises:
      UserError: the directory is absent, has no usable `config.json`, or has an unknown `model_type`.
    """
    directory = checked_directory(directory)
    hf = read_json(directory / "config.json") | {k: v for k, v in (overrides or {}).items() if v is not None}
    for key, value in _special_ids(directory, families.family_of_type(hf.get("model_type"))).items():
        if hf.get(key) is None:
            hf[key] = value
    return {key: value for key, value in hf.items() if not (key.endswith("_token_id") and value is None)}


def read_config(directory: str | os.PathLike, overrides: Mapping[str, Any] | None = None) -> DenoiserConfig:
    """Reads the configuration of the model in a checkpoint directory.

    Args:
      overrides: keys of `config.json` to set or replace, such as a `mask_token_id` that no file declares. A key whose
        value is None is left as it is.

    Raises:
      UserError: as for `declared`, or a required token id is declared in no file.
    """
    hf = declared(directory, overrides)
    if isinstance(hf.get("eos_token_id"), list) and hf["eos_token_id"]:
        # Each id of the list ends a turn. The first is the EOS; `Tokenizer.end_token_ids` has the others.
        hf["eos_token_id"] = hf["eos_token_id"][0]
    return families.read_config(hf)


def _special_ids(directory: epath.Path, family: families.Family) -> dict[str, int]:
    """Returns the ids of special tokens in the tokenizer's files, by the key of `config.json` that would hold them.

    The texts of these tokens come from the family or, where it names none, from the mask, EOS and pad token in
    `tokenizer_config.json`.
    """
    by_text: dict[str, int] = {}
    named = dict(family.tokens)
    for file in ("tokenizer.json", "added_tokens.json", "tokenizer_config.json"):
        if (directory / file).is_file():
            with understood(directory / file, "download it again"):
                _collect(file, read_json(directory / file), by_text, named)
    return {key: by_text[text] for key, text in named.items() if type(by_text.get(text)) is int}


def _collect(file: str, content: Mapping[str, Any], by_text: dict[str, int], named: dict[str, str]) -> None:
    """Adds the contents of one of the tokenizer's files: ids to `by_text`, texts of special tokens to `named`."""
    if file == "tokenizer.json":
        by_text |= {entry["content"]: entry["id"] for entry in content.get("added_tokens") or ()}
    elif file == "added_tokens.json":
        by_text |= content
    else:
        added = content.get("added_tokens_decoder") or {}
        by_text |= {entry["content"]: int(index) for index, entry in added.items()}
        for key in ("mask_token", "eos_token", "pad_token"):
            entry = content.get(key)
            text = entry.get("content") if isinstance(entry, Mapping) else entry
            if isinstance(text, str):
                named.setdefault(f"{key}_id", text)
