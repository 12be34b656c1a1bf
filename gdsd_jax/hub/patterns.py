"""Matches names with regular expressions from files, in a separate process, under limits of time and memory.

An adapter may name its modules by a regular expression, and the time that Python takes for one can double with every
character of a name, as for `(a|a)*b`. Nothing in the process itself can interrupt such a match.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

from gdsd_jax.runtime.errors import UserError

SECONDS = 10.0
_WORKER = """
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
pattern, names = json.load(sys.stdin)
try:
    found = re.compile(pattern)
except (re.error, OverflowError, RecursionError, MemoryError) as error:
    print(json.dumps(f"is no regular expression ({error})"))
else:
    print(json.dumps([name for name in names if found.fullmatch(name)]))
"""


def matching(pattern: str, names: Sequence[str], where: str) -> list[str]:
    """Returns the names that a regular expression matches from their beginning to their end.

    Raises:
      UserError: `pattern` is no regular expression, or takes too much time or memory; the message begins with `where`.
    """
    command, request = [sys.executable, "-I", "-S", "-c", _WORKER], json.dumps([pattern, list(names)])
    shown = f"{where} {pattern[:200]!r}"
    try:
        done = subprocess.run(command, input=request, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(f"{shown} takes more than {SECONDS:g} s: list the modules instead") from None
    if done.returncode:
        raise UserError(f"{shown} takes too much memory: list the modules instead")
    answer = json.loads(done.stdout)
    if isinstance(answer, str):
        raise UserError(f"{shown} {' '.join(answer.split())[:200]}: list the modules instead")
    return answer
