"""Reads demonstrations for supervised training from files of prompts and completions, or of chats.

A row has the columns `prompt` and `completion`, or `messages`. A prompt is the text of a user's turn or a list of
turns, a completion a text or a list of one assistant's turn. Every turn is a mapping of `role` ("system", "user" or
"assistant") and `content`. Every assistant's turn of a chat is a demonstration, with the turns before it as its prompt.
`gdsd_jax.tasks.data.read_records` says which kinds of files are read.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from gdsd_jax.runtime.errors import UserError
from gdsd_jax.tasks.data import Row, column, read_records

ROLES = ("system", "user", "assistant")


class Demonstration(NamedTuple):
    """The turns of a chat that an assistant answers, and the answer."""

    messages: list[dict[str, str]]
    answer: str


def read_demonstrations(path: Path) -> list[Demonstration]:
    """Returns the demonstrations of a file, in its order.

    Raises:
      UserError: the file cannot be read, or a row is neither a prompt with a completion nor a chat with an answer.
    """
    return [found for place, row in read_records(path) for found in _of_row(place, row)]


def _of_row(place: str, row: Row) -> list[Demonstration]:
    if row.get("messages") is not None:
        turns = _turns(place, row["messages"])
        answers = [index for index, turn in enumerate(turns) if index and turn["role"] == "assistant"]
        if not answers:
            raise UserError(f"{place}: messages hold no assistant's turn after another turn, so nothing to learn from")
        return [Demonstration(turns[:index], turns[index]["content"]) for index in answers]
    prompt = column(place, row, "messages", "prompt")
    completion = column(place, row, "completion")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _turns(place, prompt)
    if not isinstance(completion, str):
        turns = _turns(place, completion)
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            raise UserError(f"{place}: completion must be a text or one turn of the assistant")
        completion = turns[0]["content"]
    return [Demonstration(messages, completion)]


def _turns(place: str, value: Any) -> list[dict[str, str]]:
    """Returns the turns of a chat as plain mappings, checked."""
    turns = list(value) if hasattr(value, "__iter__") and not isinstance(value, (str, bytes, dict)) else []
    for turn in turns:
        good = isinstance(turn, dict) and turn.get("role") in ROLES and isinstance(turn.get("content"), str)
        if not good:
            roles = ", ".join(ROLES)
            raise UserError(f"{place}: a turn is a mapping of role ({roles}) and content, a text, not {turn!r:.60}")
    if not turns:
        raise UserError(f"{place}: messages, or a prompt that is not a text, must be a list of at least one turn")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def held_out(messages: list[dict[str, str]], share: float) -> bool:
    """Returns whether a prompt belongs to the held-out share; a hash of the prompt decides, and nothing else."""
    text = json.dumps(messages, sort_keys=True)
    digest = hashlib.sha256(f"held out:{text}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) < share * 2**64
