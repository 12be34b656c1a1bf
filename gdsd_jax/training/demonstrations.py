"""Makes the rows of supervised training: prompts and answers of a task or of a file, some of them held out.

B rows, P prompt tokens, L completion tokens, T tokens of a packed row.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gdsd_jax.config import SFTConfig, TrainConfig
from gdsd_jax.hub.tokenizer import Tokenizer
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.tasks import Task
from gdsd_jax.tasks.chats import Demonstration, held_out, read_demonstrations
from gdsd_jax.training.setup import Setup, task_rows


class Encoded(NamedTuple):
    """Demonstrations: `[B, P+L]` int32 tokens, prompts padded on the left, and `[B, P]` bool, True on real tokens."""

    tokens: Any
    prompt_mask: Any


class Packed(NamedTuple):
    """Rows of several demonstrations one behind the other, each ended by one EOS.

    Attributes:
      tokens: `[B, T]` int32.
      texts: `[B, T]` int32, the number of each token's demonstration in its row, from 1; 0 on the pads at the end.
      answers: `[B, T]` bool, True on the tokens of answers, EOS included.
    """

    tokens: Any
    texts: Any
    answers: Any


def rows_of(rows: Encoded | Packed, chosen: np.ndarray) -> Encoded | Packed:
    """Returns the chosen rows."""
    return type(rows)(*(x[chosen] for x in rows))


def encoded_demonstrations(config: TrainConfig, setup: Setup) -> tuple[Encoded | Packed, Encoded | Packed]:
    """Returns the demonstrations to train on, and those that are held out, which may be none.

    Raises:
      UserError: the file is not valid, an answer does not fit, or one of the two shares is empty.
    """
    settings, task = config.sft, setup.task
    if settings.path is not None:
        if settings.careless:
            raise UserError("config.sft.careless is for the rows of a task: set it to 0, or config.sft.path to None")
        found, prefix = read_demonstrations(Path(settings.path)), ""
    else:
        rows = task_rows(config.task, task, "train", count=config.task.train_rows, seed=settings.seed)
        careless = demonstrations(task, rows, settings)
        found = [Demonstration(task.messages(row), task.answer(told)) for row, told in zip(rows, careless, strict=True)]
        prefix = task.assistant_prefix
    texts = [setup.tokenizer.render(one.messages, prefix) for one in found]
    prompts, mask = setup.tokenizer.prompts(texts, buckets=config.prompt_buckets, overlong=config.overlong_prompts)
    length = config.sampler.completion_length
    answers = encode_answers(setup.tokenizer, [one.answer for one in found], length, setup.model.eos_token_id)
    tokens = np.concatenate([prompts, answers], axis=1)
    apart = np.array([held_out(one.messages, settings.held_out) for one in found])
    if apart.all() or (settings.held_out and not apart.any()):
        what = "all" if apart.all() else "none"
        raise UserError(f"config.sft.held_out {settings.held_out} holds out {what} of {len(found)} demonstrations")
    shares = Encoded(tokens[~apart], mask[~apart]), Encoded(tokens[apart], mask[apart])
    if settings.packed_length is None:
        return shares
    if setup.model.block_size is not None:
        raise UserError("config.sft.packed_length packs rows, which block-causal attention cannot read: set it to None")
    if settings.packed_length > setup.model.max_length:
        raise UserError(
            f"config.sft.packed_length {settings.packed_length} exceeds the model's {setup.model.max_length} tokens"
        )
    shown, held = (pack(share, settings.packed_length, setup.model.eos_token_id) for share in shares)
    return shown, held


def pack(rows: Encoded, length: int, eos_token_id: int) -> Packed:
    """Packs demonstrations into rows of `length` tokens, the longest first, each into the fullest row that has room.

    Raises:
      UserError: a demonstration is longer than a row.
    """
    texts = []
    for tokens, real in zip(rows.tokens, rows.prompt_mask, strict=True):
        prompt, answer = tokens[: len(real)][real], tokens[len(real) :]
        ends = np.flatnonzero(answer != eos_token_id)
        texts.append((prompt, answer[: (ends[-1] + 1 if len(ends) else 0) + 1]))
    sizes = [len(prompt) + len(answer) for prompt, answer in texts]
    if max(sizes, default=0) > length:
        raise UserError(f"a demonstration of {max(sizes)} tokens exceeds config.sft.packed_length {length}")
    packed: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of each row that is not full, with its number, in order
    for index in sorted(range(len(texts)), key=lambda index: -sizes[index]):
        place = bisect.bisect_left(room, (sizes[index], -1))
        left, row = room.pop(place) if place < len(room) else (length, len(packed))
        if row == len(packed):
            packed.append([])
        packed[row].append(index)
        bisect.insort(room, (left - sizes[index], row))
    out = Packed(*(np.zeros((len(packed), length), dtype) for dtype in (np.int32, np.int32, bool)))
    for row, indices in enumerate(packed):
        put_in_row(out, row, [texts[index] for index in indices])
    return out


def put_in_row(out: Packed, row: int, texts: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """Writes prompts with their answers into one row, one behind the other."""
    start = 0
    for number, (prompt, answer) in enumerate(texts, start=1):
        end = start + len(prompt) + len(answer)
        out.tokens[row, start:end] = np.concatenate([prompt, answer])
        out.texts[row, start:end] = number
        out.answers[row, start + len(prompt) : end] = True
        start = end


def encode_answers(tokenizer: Tokenizer, texts: list[str], length: int, eos_token_id: int) -> np.ndarray:
    """Returns reference completions as `[B, L]` int32 ids, each ended and padded by EOS.

    Raises:
      UserError: a completion does not fit.
    """
    out = np.full((len(texts), length), eos_token_id, np.int32)
    for row, ids in zip(out, tokenizer.encode_text(texts), strict=True):
        if len(ids) >= length:
            raise UserError(
                f"a reference completion of {len(ids)} tokens and its EOS exceed "
                f"config.sampler.completion_length {length}"
            )
        row[: len(ids)] = ids
    return out


def demonstrations(task: Task, rows: list[dict], config: SFTConfig) -> list[dict]:
    """Returns the rows to imitate: with `config.careless` above 0, as a careless demonstrator writes them.

    Raises:
      UserError: the share is not in [0, 1], or the task does not define careless demonstrations.
    """
    if not 0.0 <= config.careless <= 1.0:
        raise UserError(f"config.sft.careless {config.careless} must lie in [0, 1]")
    if not config.careless:
        return rows
    if task.careless is None:
        raise UserError(f"task {task.name} has no careless demonstrations: set config.sft.careless to 0")
    generator = random.Random(config.seed)
    return [task.careless(row, config.careless, generator) for row in rows]
