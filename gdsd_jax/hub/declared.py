"""Reads the `config.json` of a checkpoint, and takes token ids that it lacks from the tokenizer's files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from gdsd_jax import families
from gdsd_jax.denoiser import DenoiserConfig
from gdsd_jax.hub.expansion import require_bounded, require_few_added
from gdsd_jax.hub.files import MOST_JSON_BYTES, checked_directory, read_json
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.files import understood

_IDS = ("mask_token_id", "eos_token_id", "pad_token_id")


def declared(directory: str | os.PathLike, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns `config.json` as a mapping, with `overrides` applied and missing token ids from the other files.

    These are the tokenizer's files and then `generation_config.json`. An id of -1 or null is missing. A pad that no
    file declares is the EOS, as pads are never attended to.

    Raises:
      UserError: the directory is absent, has no usable `config.json`, or has an unknown `model_type`; or a tokenizer
        there could not be used within bounds (see `gdsd_jax.hub.expansion`).
    """
    directory = checked_directory(directory)
    hf = read_json(directory / "config.json")
    hf = {key: value for key, value in hf.items() if not (key.endswith("_token_id") and value in (None, -1))}
    hf |= {key: value for key, value in (overrides or {}).items() if value is not None}
    settings = directory / "generation_config.json"
    generation = read_json(settings) if settings.is_file() else {}
    for found in (_special_ids(directory, families.family_of_type(hf.get("model_type"))), generation):
        hf |= {key: found[key] for key in _IDS if key not in hf and found.get(key) not in (None, -1)}
    if "eos_token_id" in hf:
        hf.setdefault("pad_token_id", hf["eos_token_id"])
    return hf


def read_config(directory: str | os.PathLike, overrides: Mapping[str, Any] | None = None) -> DenoiserConfig:
    """Reads the configuration of the model in a checkpoint directory.

    Args:
      overrides: keys of `config.json` to set or replace, such as a `mask_token_id` that no file declares. A key whose
        value is None is left as it is.

    Raises:
      UserError: as for `declared`, or a required token id is declared in no file.
    """
    hf = declared(directory, overrides)
    for key in ("eos_token_id", "pad_token_id"):
        if isinstance(hf.get(key), list) and hf[key]:
            # Each id of the list ends a turn. The first is the EOS; `Tokenizer.end_token_ids` has the others.
            hf[key] = hf[key][0]
    return families.read_config(hf)


def _special_ids(directory: epath.Path, family: families.Family) -> dict[str, int]:
    """Returns the ids of special tokens in the tokenizer's files, by the key of `config.json` that would hold them.

    The texts of these tokens come from the family or, where it names none that the tokenizer has, from the mask, EOS
    and pad token in `tokenizer_config.json` and `special_tokens_map.json`.
    """
    by_text: dict[str, int] = {}
    texts = {key: [family.tokens[key]] if key in family.tokens else [] for key in _IDS}
    for file in ("tokenizer.json", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (directory / file).is_file():
            with understood(directory / file, "download it again"):
                _collect(directory / file, read_json(directory / file, MOST_JSON_BYTES), by_text, texts)
    found = {key: next((by_text[text] for text in named if text in by_text), None) for key, named in texts.items()}
    return {key: value for key, value in found.items() if type(value) is int}


def _collect(
    file: epath.Path, content: Mapping[str, Any], by_text: dict[str, int], texts: dict[str, list[str]]
) -> None:
    """Adds the contents of one of the tokenizer's files: ids to `by_text`, texts of special tokens to `texts`.

    Raises UserError if the tokenizer could not be loaded or used within bounds.
    """
    if file.name == "tokenizer.json":
        require_bounded(file, content)
        by_text |= {entry["content"]: entry["id"] for entry in content.get("added_tokens") or ()}
    elif file.name == "added_tokens.json":
        require_few_added(file, content)
        by_text |= content
    else:
        added = content.get("added_tokens_decoder") or {}
        for tokens in (added, content.get("additional_special_tokens"), content.get("extra_special_tokens")):
            require_few_added(file, tokens or ())
        if "fast_tokenizer_files" in content:
            raise UserError(f"{file}: fast_tokenizer_files names files that are not read: remove it")
        by_text |= {entry["content"]: int(index) for index, entry in added.items()}
        for key, named in texts.items():
            entry = content.get(key.removesuffix("_id"))
            text = entry.get("content") if isinstance(entry, Mapping) else entry
            if isinstance(text, str):
                named.append(text)
