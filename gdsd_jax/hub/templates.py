"""Renders chat templates in a separate process, under limits of time and memory."""

from __future__ import annotations

import json
import select
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gdsd_jax.runtime.errors import UserError

_WORKER = Path(__file__).with_name("template_worker.py")
_SECONDS = 10.0  # of processor time for one rendering; an ordinary template takes milliseconds
_PATIENCE = 300.0  # seconds to wait for an answer, on however busy a machine


class Renderer:
    """Renders a chat template as transformers does.

    Args:
      template: the text of the template.
      variables: what the template may use besides the messages, such as the texts of special tokens.
      where: the checkpoint, to be named in error messages.
    """

    def __init__(self, template: str, variables: Mapping[str, str], where: object):
        self._where, self._template, self._variables = where, template, dict(variables)
        self._process: subprocess.Popen | None = None

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        """Returns the text of a chat.

        Raises:
          UserError: the template refuses the messages, takes too long, or needs too much memory.
        """
        if self._process is None:
            self._start()
        request = {
            "messages": list(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return self._ask(self._variables | request)

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(_WORKER), json.dumps(sys.path), str(_SECONDS)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
        )  # fmt: skip
        weakref.finalize(self, self._process.kill)
        self._ask(self._template)

    def _ask(self, request: Any) -> str:
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            if not select.select([self._process.stdout], [], [], _PATIENCE)[0]:
                raise self._ended(f"gives no answer within {_PATIENCE:g} s")
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if not line.endswith("\n"):
            if self._process.wait() == -signal.SIGPROF:
                raise self._ended(f"takes more than {_SECONDS:g} s")
            raise self._ended("ended the process that renders it: it takes too much memory")
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(f"the chat template of {self._where} refuses the messages: {answer['error']}")
        return answer["text"]

    def _ended(self, reason: str) -> UserError:
        self._process.kill()
        self._process.wait()
        self._process = None
        return UserError(f"the chat template of {self._where} {reason}: use a checkpoint with another one")
