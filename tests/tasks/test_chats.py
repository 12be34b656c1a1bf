"""Demonstrations from files: prompts with completions, chats, and what is neither."""

import json

import numpy as np
import pytest

from gdsd_jax.runtime.errors import UserError
from gdsd_jax.tasks.chats import Demonstration, held_out, read_demonstrations

USER, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
SYSTEM, MORE = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "And 3+3?"}


def written(tmp_path, *rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_prompts_with_completions_and_chats(tmp_path):
    last = {"role": "assistant", "content": "6"}
    file = written(
        tmp_path,
        {"prompt": "2+2?", "completion": "4"},
        {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
        {"messages": [SYSTEM, USER, ANSWER, MORE, last]},
    )
    assert read_demonstrations(file) == [
        Demonstration([USER], "4"),
        Demonstration([SYSTEM, USER], "4"),
        Demonstration([SYSTEM, USER], "4"),
        Demonstration([SYSTEM, USER, ANSWER, MORE], "6"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "2+2?"}, "line 1: a row needs completion, it has prompt"),
        ({"question": "2+2?"}, "line 1: a row needs messages or prompt, it has question"),
        ({"messages": [USER]}, "hold no assistant's turn after another turn"),
        ({"messages": [ANSWER]}, "hold no assistant's turn after another turn"),
        ({"messages": [USER, {"role": "robot", "content": "4"}]}, "a turn is a mapping of role"),
        ({"messages": [USER, {"role": "assistant", "content": 4}]}, "a turn is a mapping of role"),
        ({"messages": "2+2?"}, "must be a list of at least one turn"),
        ({"prompt": "2+2?", "completion": [USER]}, "completion must be a text or one turn of the assistant"),
    ],
)
def test_rows_that_are_neither(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        read_demonstrations(written(tmp_path, row))


def test_a_share_is_held_out_by_the_prompt_alone():
    chats = [[{"role": "user", "content": str(n)}] for n in range(2000)]
    found = np.array([held_out(chat, 0.2) for chat in chats])
    assert abs(found.mean() - 0.2) < 0.03
    more = np.array([held_out(chat, 0.5) for chat in chats])
    assert (more | ~found).all() and not any(held_out(chat, 0.0) for chat in chats)
