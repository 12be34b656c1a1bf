"""Refuses tokenizers whose declared steps could make a text so much longer that nothing could hold it.

A step such as the replacement of "e" by "ee" doubles a text, and a tokenizer may declare any number of steps.
"""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from gdsd_jax.runtime.errors import UserError

_MOST_GROWTH = 1000  # of published tokenizers: up to 33, for a ligature that stands for four Arabic words
_MOST_STEPS = 256
_MOST_ADDED = 20_000  # LLaDA and Dream add fewer than 300 tokens, Gemma 6,400; each costs time when they are loaded

# Upper bounds for the steps that add characters, other than those with a text of their own. The normal forms of Unicode
# and lower case are absent, because a second application changes nothing.
_GROWTH = {"ByteLevel": 5, "BertNormalizer": 3, "Metaspace": 2, "WordPiece": 2, "BPEDecoder": 2, "CTC": 2}


def require_bounded(file: os.PathLike, content: Mapping[str, Any]) -> None:
    """Checks what a `tokenizer.json` declares before it is loaded, which applies some of its steps already.

    Raises:
      UserError: the file adds too many tokens, or has too many steps or steps that lengthen a text too much.
    """
    require_few_added(file, content.get("added_tokens") or ())
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        steps = list(_steps(content.get(part)))
        growth = math.prod(map(_growth, steps[:_MOST_STEPS]))
        if len(steps) > _MOST_STEPS or growth > _MOST_GROWTH:
            raise UserError(
                f"{file}: its {part} has {len(steps)} steps that make a text up to {growth:.3g} times as long, the "
                f"limits are {_MOST_STEPS} and {_MOST_GROWTH}: use the tokenizer.json of the published checkpoint"
            )


def require_few_added(file: os.PathLike, added: Collection[Any]) -> None:
    """Raises UserError if a file of a tokenizer adds more tokens than any published one does."""
    if len(added) > _MOST_ADDED:
        raise UserError(
            f"{file} adds {len(added)} tokens, more than the {_MOST_ADDED} that are read: "
            "put them into the vocabulary of its model"
        )


def _steps(part: Any) -> Iterator[Any]:
    """Yields the single steps of a part, which may be a sequence, also of sequences."""
    waiting = [part]
    while waiting:
        step = waiting.pop()
        if step is not None:
            yield step
        if isinstance(step, Mapping):
            for nested in ("normalizers", "pretokenizers", "decoders"):
                waiting += step[nested] if isinstance(step.get(nested), list) else ()


def _growth(step: Any) -> float:
    """Returns how many times as long a step makes a text at most.

    The library guesses the kind of a step without a type from its keys, and takes lists for steps. No published
    tokenizer is written so; the first counts as the worst kind, the second is refused.
    """
    if not isinstance(step, Mapping):
        return math.inf
    pattern, content, prepend = step.get("pattern"), step.get("content"), step.get("prepend")
    growth = _GROWTH.get(str(step.get("type")), 1) if "type" in step else max(_GROWTH.values())
    if isinstance(content, str):
        text = pattern.get("String") if isinstance(pattern, Mapping) else None
        # A pattern that matches nothing inserts the content before every character, and keeps the character. Any
        # regular expression may be one.
        growth = max(growth, len(content) / len(text) if text and isinstance(text, str) else 1 + len(content))
    if isinstance(prepend, str):
        growth = max(growth, 1 + len(prepend))
    return max(growth, _longest_replacement(step.get("precompiled_charsmap")))


def _longest_replacement(table: Any) -> int:
    """Returns the longest text in SentencePiece's table of replacements: a length, a trie, and texts with zeros."""
    try:
        raw = base64.b64decode(table)
    except (ValueError, TypeError):
        return 1
    return max(map(len, raw[4 + int.from_bytes(raw[:4], "little") :].split(b"\0")))
