r"""Finds the one number that answers a word problem, however it is written: `$9{,}500`, 18 dollars every 2 weeks, 18½.

The answer is found as for mathematics (`extract`), or behind the last `####`. It is read as mathematics first. A
sentence is not mathematics: its number is the first one, or the first one behind its last "is" or "=".
"""

import re

from gdsd_jax.tasks.graders import compare, extract
from gdsd_jax.tasks.graders.answers import Answer, Opaque, Relation, Scalar, read
from gdsd_jax.tasks.graders.tokens import Unreadable, translate
from gdsd_jax.tasks.graders.trees import symbols

MAX_LINE = 400
_LATEX = (
    (re.compile(r"\\[dt]?frac\s?\{([0-9]{1,20})\}\s?\{([0-9]{1,20})\}"), r" \1/\2 "),
    (re.compile(r"\\(?:text|mbox|textbf|mathrm|mathbf|textrm)\s?\{"), " {"),
    (re.compile(r"\\(?:currency\{\w+\}|[$%])"), lambda found: "%" if found[0] == "\\%" else "$"),
    (re.compile(r",\\!\s?|\{,\}|\\[,;: ]|\{ *, *\}"), ","),
    (re.compile(r"(?<=[0-9])\s*\{,\}\s*(?=[0-9]{3})"), ","),
    (re.compile(r"\\(?:left|right|quad|displaystyle|[()\[\]])"), " "),
    (re.compile(r"\\times|\\cdot"), "*"),
    (re.compile(r"[{}]|\*\*|__|`"), ""),
)
# A sign belongs to the number if nothing before it could be the minuend of a subtraction.
_NUMBER = re.compile(
    r"(?P<minus>(?<![0-9A-Za-z)\]])-\s?)?(?:\$(?P<inner>-)?)?"
    r"(?P<whole>[0-9]{1,3}(?:[, ][0-9]{3})+(?![0-9])|[0-9]{1,3}(?:['’][0-9]{3})+(?![0-9])|[0-9]{1,400})"
    r"(?P<point>\.[0-9]{1,400})?(?P<fraction>\s[0-9]{1,20}/[0-9]{1,20}|/[0-9]{1,20})?"
)
_LEAD = re.compile(r"^(?:the answer is|answer:|\$|\s)+")
_LOW = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORDS = {word: number for number, word in enumerate(f"{_LOW} eighteen nineteen".split())}
_WORDS |= {word: 10 * number for number, word in enumerate(_TENS.split(), start=2)}
_SEPARATORS = str.maketrans("", "", ", '’")
_SCALE = re.compile(r"\s?(?:(?P<k>[kK]|thousand)|(?P<m>million)|(?P<b>billion))\b")
_POWERS = {"k": 1000, "m": 1000**2, "b": 1000**3}
_VERB = re.compile(r"(?i)\b(?:is|are|equals?|was)\b|=|:")
_REMARK = re.compile(r"\s+\((?=[^()]{0,200}\)[\s.]{0,4}$)")
_RAISED = re.compile(r"(?<=[A-Za-z)])\s?\^\s?[0-9]+|(?<=[A-Za-z])[23](?![0-9])")


def equal(gold: str, completion: str) -> bool:
    """Returns whether the completion's number equals the gold."""
    text = answer(completion)
    return text is not None and says(gold, text)


def answer(completion: str) -> str | None:
    """Returns the part of a completion that gives its answer, or None."""
    text = extract.scope(completion)
    found = extract.boxes(text)
    if found is not None:
        return found or None
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0].strip() or None
    stated = extract.stated(text)
    if stated is not None:
        return stated
    if text is not completion:  # inside tags
        return text.strip() or None
    return _last_sentence(text)


def _last_sentence(text: str) -> str | None:
    """Returns the last line with a digit or, if it has several sentences, the last of them with a digit."""
    for line in reversed(text.splitlines()[-20:]):
        for sentence in reversed(re.split(r"(?<=[a-z0-9)])[.!?]\s+(?=[A-Z])", line[-MAX_LINE:])):
            if re.search("[0-9]", sentence):
                return sentence
    return None


def says(gold: str, text: str) -> bool:
    """Returns whether a text that gives an answer gives this number."""
    text = _without_remark(text.strip()[:MAX_LINE])
    if compare.equal(gold, text):
        return True
    typed = _typed(text)
    if typed is not None:
        return False
    number = first_number(text) or spelled(text)
    return number is not None and compare.equal(gold, number)


def _without_remark(text: str) -> str:
    """Returns the text without a remark in parentheses after a number: 18 (= 9 * 2)."""
    found = _REMARK.search(text)
    return text[: found.start()] if found and re.search("[0-9]", text[: found.start()]) else text


def _typed(text: str) -> Answer | None:
    """Returns the answer as mathematics, if it is a claim about numbers only.

    If such a claim is wrong, it is not read again as a sentence.
    """
    try:
        found = read(text)
    except (Unreadable, RecursionError):
        return None
    if isinstance(found, Opaque) or _mentions(found):
        return None
    return found


def _mentions(found: object) -> bool:
    """Returns whether the answer contains words or symbols."""
    if isinstance(found, Opaque):
        return True
    if isinstance(found, Relation):
        return any(map(_mentions, found.sides))
    if isinstance(found, Scalar):
        return any(map(symbols, found.trees))
    return isinstance(found, tuple) and any(_mentions(part) for part in found if isinstance(part, tuple))


def spelled(text: str) -> str | None:
    """Returns the number in words with which a text without digits begins, such as "seventy-two clips", as digits."""
    if re.search("[0-9]", text):
        return None
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    total = part = 0
    found = False
    for word in re.split(r"[\s-]+", _LEAD.sub("", text.strip().lower()))[:20]:
        word = word.rstrip(".,;:!")
        if word in _WORDS:
            part, found = part + _WORDS[word], True
        elif word == "hundred" and found:
            part *= 100
        elif word in ("thousand", "million") and found:
            total, part = total + part * (1000 if word == "thousand" else 10**6), 0
        elif word != "and" or not found:
            break
    return str(total + part) if found else None


def first_number(text: str) -> str | None:
    """Returns the number of a sentence, as plain text; None if there is none, or if it is part of an operation."""
    text = translate(text)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    text = _RAISED.sub("", text)
    verbs = [found.end() for found in _VERB.finditer(text) if re.search("[0-9]", text[found.end() :])]
    found = _NUMBER.search(text, verbs[-1] if verbs else 0)
    if found is None:
        return None
    before, after = text[: found.start()].rstrip(" $"), text[found.end() :].lstrip(" ")
    operators = ("+", "*", "/", "^")
    if before[-1:] in operators or after[:1] in operators or re.match(r"-\s?\$?[0-9]", after):
        return None
    if before[-1:] == "-" and found["minus"] is None:
        return None
    scale = _SCALE.match(text, found.end())
    factor = f"*{_POWERS[scale.lastgroup]}" if scale else ""
    sign = "-" if bool(found["minus"]) != bool(found["inner"]) else ""
    number = f"{sign}{found['whole'].translate(_SEPARATORS)}{found['point'] or ''}{found['fraction'] or ''}"
    return f"({number}){factor}" if factor else number
