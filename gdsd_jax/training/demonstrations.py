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
    """Rows of several demonstrations one after another, each ended by one EOS.

    Attributes:
      tokens: `[B, T]` int32.
      texts: `[B, T]` int32, the number of each token's demonstration in its row, from 1; 0 on the pads at the end.
      answers: `[B, T]` bool, True on the tokens of answers, including the EOS.
    """

    tokens: Any
    texts: Any
    answers: Any


def rows_of(rows: Encoded | Packed, chosen: np.ndarray) -> Encoded | Packed:
    """Returns the chosen rows."""
    return type(rows)(*(x[chosen] for x in rows))


def of_file(settings: SFTConfig) -> list[Demonstration]:
    """Returns the demonstrations of `config.sft.path`.

    Raises:
      UserError: the file is not valid, or `config.sft.careless` is set, which needs the rows of a task.
    """
    if settings.careless:
        raise UserError("config.sft.careless needs the rows of a task: set it to 0, or config.sft.path to None")
    return read_demonstrations(Path(settings.path))


def encoded_demonstrations(config: TrainConfig, setup: Setup) -> tuple[Encoded | Packed, Encoded | Packed]:
    """Returns the demonstrations to train on, and those that are held out.

    Raises:
      UserError: the file is not valid, an answer does not fit, or the config's share leaves one of the two sets empty.
    """
    settings, task = config.sft, setup.task
    if settings.path is not None:
        found, prefix = of_file(settings), ""
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
        count = "all" if apart.all() else "none"
        raise UserError(
            f"config.sft.held_out {settings.held_out} holds out {count} of {len(found)} demonstrations: change it"
        )
    shares = Encoded(tokens[~apart], mask[~apart]), Encoded(tokens[apart], mask[apart])
    if settings.packed_length is None:
        return shares
    if setup.model.block_size is not None:
        raise UserError("block-causal models cannot train on packed rows: set config.sft.packed_length to None")
    if settings.packed_length > setup.model.max_length:
        raise UserError(
            f"config.sft.packed_length {settings.packed_length} exceeds the model's {setup.model.max_length} "
            "tokens: lower it"
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
        raise UserError(f"a demonstration of {max(sizes)} tokens exceeds config.sft.packed_length {length}: raise it")
    packed: list[list[int]] = []
    # The room that is left in each row, and the row's number, in order of room.
    room: list[tuple[int, int]] = []
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
    """Writes prompts with their answers into one row, one text after another."""
    start = 0
    for number, (prompt, answer) in enumerate(texts, start=1):
        end = start + len(prompt) + len(answer)
        out.tokens[row, start:end] = np.concatenate([prompt, answer])
        out.texts[row, start:end] = number
        out.answers[row, start + len(prompt) : end] = True
        start = end


def encode_answers(tokenizer: Tokenizer, texts: list[str], length: int, eos_token_id: int) -> np.ndarray:
    """Returns reference completions as `[B, L]` int32 ids, each followed by EOS up to the length L.

    Raises:
      UserError: a completion and its EOS do not fit.
    """
    out = np.full((len(texts), length), eos_token_id, np.int32)
    for row, ids in zip(out, tokenizer.encode_text(texts), strict=True):
        if len(ids) >= length:
            raise UserError(
                f"a reference completion has {len(ids)} tokens and needs an EOS, which exceeds "
                f"config.sampler.completion_length {length}: raise it"
            )
        row[: len(ids)] = ids
    return out


def demonstrations(task: Task, rows: list[dict], config: SFTConfig) -> list[dict]:
    """Returns the rows to imitate; the share `config.careless` of each is wrong, in the way that the task defines.

    Raises:
      UserError: the task does not define careless demonstrations.
    """
    if not config.careless:
        return rows
    if task.careless is None:
        raise UserError(f"task {task.name} has no careless demonstrations: set config.sft.careless to 0")
    generator = random.Random(config.seed)
    return [task.careless(row, config.careless, generator) for row in rows]
