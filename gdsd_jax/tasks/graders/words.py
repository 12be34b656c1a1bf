"""Reads numbers in words: twelve, seventy-two clips, minus three, three and a half, nine thousand five hundred."""

import re
from fractions import Fraction

from gdsd_jax.tasks.graders import units

MAX_WORDS = 20
_LOW = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
VALUES = {word: number for number, word in enumerate(f"{_LOW} eighteen nineteen".split())}
VALUES |= {word: 10 * number for number, word in enumerate(_TENS.split(), start=2)}
_SCALES = {"thousand": 1000, "million": 10**6, "billion": 10**9}
_LEAD = re.compile(
    r"(?:(?:the |final )*answer is|answer ?:|about|around|approximately|exactly|a total of|just|only|=|:|\s)+"
)
_MARKS = re.compile(r"\\[A-Za-z]+\s?|[{}$*_`\\~]")
# After the number, these words make it another number, or two.
_MORE = (units.SENTENCE | set(units.SCALES) | set(VALUES) | set(_SCALES) | {"squared", "cubed", "point"}) - {"half"}


def number(text: str) -> str | None:
    """Returns the number in words that a text without digits consists of, with its unit, as digits; else None."""
    if re.search("[0-9]", text):
        return None
    text = _MARKS.sub(" ", text.lower()).strip()
    text = text[found.end() :] if (found := _LEAD.match(text)) else text
    words = [word.rstrip(".,;:!") for word in re.split(r"[\s-]+", text.strip(" .,;:!"))[: MAX_WORDS + 1]]
    negative = words[0] in ("minus", "negative")
    words = words[1:] if negative else words
    value, rest = _leading(words)
    if value is None or len(words) > MAX_WORDS:
        return None
    if rest[:3] == ["and", "a", "half"] or rest[:3] == ["and", "one", "half"]:
        value, rest = value + Fraction(1, 2), rest[3:]
    if not _MORE.isdisjoint(rest) or "half" in rest:
        return None
    return f"{'-' if negative else ''}{value}"


def _leading(words: list[str]) -> tuple[Fraction | None, list[str]]:
    """Returns the number with which the words begin, and the words after it."""
    total = part = Fraction(0)
    room = 100  # The next word of the same hundred must be smaller: 100, 10 after a tens word, 1 after any other.
    index, taken = 0, 0
    while index < len(words):
        word = words[index]
        if word in VALUES and VALUES[word] < room:
            room = 10 if VALUES[word] >= 20 else 1
            part += VALUES[word]
        elif word == "hundred" and 0 < part < 100:
            part, room = part * 100, 100
        elif word in _SCALES and part:
            total, part, room = total + part * _SCALES[word], Fraction(0), 100
        elif word == "and" and taken and room == 100 and index + 1 < len(words) and words[index + 1] in VALUES:
            index += 1
            continue
        else:
            break
        index += 1
        taken = index
    return (total + part if taken else None), words[taken:]
