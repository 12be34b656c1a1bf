"""Makes the messages of a chat from a row of data: templates, the answer format, worked examples."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from gdsd_jax.runtime.errors import UserError

ANSWER_FORMAT = """Reply in exactly this form: working between the first two tags, only the answer between the last two.
<reasoning>
your working
</reasoning>
<answer>
your final answer
</answer>"""

_FIELD = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")


def fill(template: str, row: Mapping[str, Any]) -> str:
    r"""Replaces every `{field}` by `str(row[field])`; other braces (`\boxed{}`, code) stay as they are.

    Raises UserError if the template names a field that the row does not have.
    """

    def field(match: re.Match) -> str:
        name = match.group(1)
        if name not in row:
            known = ", ".join(sorted(row))
            raise UserError(f"the template names {{{name}}}, rows of this task have: {known}; see config.task.settings")
        return str(row[name])

    return _FIELD.sub(field, template)


def messages(
    row: Mapping[str, Any], *, template: str, system: str = "", examples: Sequence[tuple[str, str]] = ()
) -> list[dict]:
    """Returns the chat that asks for this row: the system turn if there is one, worked examples, and the question.

    Args:
      examples: pairs (question, answer), already filled in, which become earlier turns.
    """
    chat = [{"role": "system", "content": system}] if system else []
    for question, answer in examples:
        chat += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*chat, {"role": "user", "content": fill(template, row)}]
