"""Renders chat templates in a separate process, under limits of time and memory."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gdsd_jax.runtime.errors import UserError

_WORKER = Path(__file__).with_name("template_worker.py")
_ENVIRONMENT = ("PATH", "TZ", "LANG", "LC_ALL", "LD_LIBRARY_PATH")  # no keys or tokens
_SECONDS = 10.0  # of processor time for one rendering; an ordinary template takes milliseconds
_PATIENCE = 300.0  # seconds to wait for an answer, on however busy a machine


class _Worker:
    """Holds the process that renders, which is started at the first request and again after it has ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def ask(self, request: Mapping[str, Any], where: object) -> dict[str, str]:
        """Returns the answer to one request; raises UserError, which names `where`, if the process gives none."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", str(_WORKER), json.dumps(sys.path)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                    encoding="utf-8", env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                )  # fmt: skip
                weakref.finalize(self, self._process.kill)
            try:
                answer = self._exchange(json.dumps(request))
            except _EndedError as reason:
                self._end()
                text = f"the chat template of {where} {reason}: use a checkpoint with another one"
                raise UserError(text) from None
            except BaseException:  # an interrupt must leave no answer behind, which the next request would take
                self._end()
                raise
            if answer.get("error", "").startswith(MemoryError.__name__):
                self._end()
            return answer

    def _exchange(self, request: str) -> dict[str, str]:
        try:
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
            if not select.select([self._process.stdout], [], [], _PATIENCE)[0]:
                raise _EndedError(f"gives no answer within {_PATIENCE:g} s")
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if line.endswith("\n"):
            return json.loads(line)
        if self._process.wait() == -signal.SIGPROF:
            raise _EndedError(f"takes more than {_SECONDS:g} s")
        raise _EndedError("ended the process that renders it: it takes too much memory")

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process = None


class _EndedError(Exception):
    """Says why a rendering has no answer."""


_worker = _Worker()  # for all templates, because its start takes longer than thousands of renderings


class Renderer:
    """Renders a chat template as transformers does.

    Args:
      template: the text of the template.
      variables: what the template may use besides the messages, such as the texts of special tokens.
      where: the checkpoint, to be named in error messages.
    """

    def __init__(self, template: str, variables: Mapping[str, str], where: object):
        self._where, self._template, self._variables = where, template, dict(variables)

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        """Returns the text of a chat.

        Raises:
          UserError: the template refuses the messages, takes too long, or needs too much memory.
        """
        chat = {"messages": list(messages), "tools": None, "documents": None}
        variables = self._variables | chat | {"add_generation_prompt": add_generation_prompt}
        request = {"template": self._template, "variables": variables, "seconds": _SECONDS}
        answer = _worker.ask(request, self._where)
        if "error" in answer:
            raise UserError(f"the chat template of {self._where} refuses the messages: {answer['error']}")
        return answer["text"]
