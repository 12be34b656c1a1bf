r"""Finds the part of a completion that is its answer: the part that the format marks, and in that the last box.

The last `<answer>` counts, even one that never closes; without any, the whole text. In that part, the answer is the
last `\boxed{}` or `\fbox{}`, or several with only commas and "and" between them. Without a box it is the text after the
last "answer is", else the part itself. Everything takes linear time in the length of the text.
"""

import re

from gdsd_jax.tasks.format import last_answer

BOXES = ("\\boxed", "\\fbox")
MAX_BOXES = 16
# The text that may separate two boxes of one answer.
_BETWEEN = re.compile(r"[\s$.]{0,8}(?:,|;|and|or|, and|, or|\\text\{ ?(?:and|or) ?\}|\\quad)[\s$]{0,8}")
_STATED = re.compile(
    r"(?i)\banswer(?:\*\*)?(?: to the (?:question|problem))?(?:\s{0,3}:|\s{1,3}is\b:?)(?:\*\*)?\s{0,3}"
)
_SENTENCE_END = re.compile(r"\n|\.\s+(?=[A-Z])|\.\s{0,3}$|\. I hope")
_BARE = 300


def scope(completion: str) -> str:
    """Returns the content of the last closed `<answer>`, else the text after the last open one, else all the text."""
    answer = last_answer(completion)
    if answer is not None:
        return answer
    return completion.rpartition("<answer>")[2]


def answer(completion: str) -> str | None:
    """Returns the answer as it is written, or None if the completion gives none."""
    text = scope(completion)
    found = boxes(text)
    if found is not None:
        return found or None
    said = stated(text)
    if said is not None:
        return said
    text = text.strip()
    return text if text and len(text) <= _BARE else None


def stated(text: str) -> str | None:
    """Returns the text after the last "answer is" or "answer:", to the end of the sentence; None without any."""
    last = next(reversed(list(_STATED.finditer(text))), None)
    if last is None:
        return None
    return _SENTENCE_END.split(text[last.end() : last.end() + 4 * _BARE].lstrip(), maxsplit=1)[0].strip("* \t") or None


def boxes(text: str) -> str | None:
    r"""Returns the content of the last box, with earlier boxes that belong to the same answer; None without a box.

    The result is empty if the last box is empty or never closes.
    """
    held: list[str] = []
    end = len(text)
    while len(held) < MAX_BOXES:
        start, command = max((text.rfind(command, 0, end), command) for command in BOXES)
        if start < 0:
            break
        content, after = _content(text, start + len(command))
        if content is None:
            return "" if not held else ", ".join(reversed(held))
        if held and not _BETWEEN.fullmatch(text, after, end):
            break
        held.append(content.strip())
        end = start
    if not held:
        return None
    # A box in a box: the outer one was not looked for, and holds the same.
    return ", ".join(reversed(held)) if all(held) else held[0]


def _content(text: str, start: int) -> tuple[str | None, int]:
    """Returns the content of a box whose command ends at `start`, and the end of the box; None if it never closes."""
    opening = re.compile(r"\s{0,3}\{").match(text, start)
    if opening is None:
        word = re.compile(r"\s{0,3}([^\s$]{0,200})").match(text, start)
        return word[1], word.end()
    depth = 0
    for index in range(opening.end() - 1, len(text)):
        depth += (text[index] == "{") - (text[index] == "}")
        if depth == 0:
            return text[opening.end() : index], index + 1
    return None, len(text)
