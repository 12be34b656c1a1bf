"""Makes the rows of supervised training: prompts and answers of a task or of a file, some of them held out."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gdsd_jax.config import SFTConfig, TrainConfig
from gdsd_jax.hub.tokenizer import Tokenizer
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.tasks import Task
from gdsd_jax.tasks.chats import Demonstration, held_out, read_demonstrations
from gdsd_jax.training.setup import Setup, task_rows


class Encoded(NamedTuple):
    """Demonstrations: `[B, P+L]` int32 tokens, prompts padded on the left, and `[B, P]` bool, True on real tokens."""

    tokens: np.ndarray
    prompt_mask: np.ndarray


def encoded_demonstrations(config: TrainConfig, setup: Setup) -> tuple[Encoded, Encoded]:
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
    return Encoded(tokens[~apart], mask[~apart]), Encoded(tokens[apart], mask[apart])


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
