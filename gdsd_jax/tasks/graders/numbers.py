r"""Finds the one number that answers a word problem, however it is written: `$9{,}500`, 18 dollars every 2 weeks, 18½.

The answer is found as for mathematics (`extract`), or after the last `####`. It is read as mathematics first. A
sentence is not mathematics: its number is the first one, or the first one after its last "is" or "=".
"""

import re

from gdsd_jax.tasks.graders import compare, extract
from gdsd_jax.tasks.graders.answers import read
from gdsd_jax.tasks.graders.kinds import Answer, Opaque, Relation, Scalar
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
    (re.compile(r"[-=]{1,2}>|→|⇒|\\(?:to|rightarrow|Rightarrow|implies)(?![A-Za-z])"), " : "),
    (re.compile(r"</?[a-z]{1,10}>"), " "),
    (re.compile(r"[{}]|\*\*|__|`"), ""),
)
# A sign belongs to the number if nothing before it could be the minuend of a subtraction.
_NUMBER = re.compile(
    r"(?P<minus>(?<![0-9A-Za-z)\]])-\s?)?(?:\$(?P<inner>-)?)?"
    r"(?P<whole>[0-9]{1,3}(?:[, ][0-9]{3})+(?![0-9])|[0-9]{1,3}(?:['’][0-9]{3})+(?![0-9])|[0-9]{1,400})"
    r"(?P<point>\.[0-9]{1,400})?(?P<fraction>\s[0-9]{1,20}/[0-9]{1,20}|/[0-9]{1,20})?"
)
_SEPARATORS = str.maketrans("", "", ", '’")
_SCALE = re.compile(r"\s?(?:(?P<h>hundred)|(?P<k>[kK]|thousand)|(?P<m>million)|(?P<b>billion))\b")
_POWERS = {"h": 100, "k": 1000, "m": 1000**2, "b": 1000**3}
_HALF = re.compile(r"\s+and (?:a|one) half\b")
_SIGNED = re.compile(r"(?i)(?<![\w)])(?:minus|negative)\s+(?=\$?[0-9])")
# A number after one of these is not the answer: it is a bound, a part of the answer, or denied.
_BOUND = re.compile(
    r"(?i)(?:\b(?:not|never|than|between|half of|twice|double|triple)|n't|[<>_]|[a-z]\(|\\(?:le|ge|ne|lt|gt)q?"
    r"|\\(?:l?not|neg))\s*(?:about\s|a\s)?\Z"
)
_LARGE = r"(?:years?|months?|weeks?|days?|hours?|hrs?|h|minutes?|mins?|feet|foot|ft|pounds?|lbs?|dollars?)"
_SMALL = r"(?:months?|weeks?|days?|hours?|minutes?|mins?|m|seconds?|secs?|inches|inch|in|ounces?|oz|cents?)"
_FRACTIONS = "(?:fif|six|seven|eigh|nin|ten|twelf|hundred|thousand)ths"
# Words that may be between the unit of a number and another number: 18 dollars every 2 weeks.
_JOINTS = (
    "(?:a|about|across|after|among|an|and|as|at|because|before|between|by|each|every|for|from|if|in|of|on|or|out|over|per"
    "|since|so|to|until|when|with|within)"
)
# What makes the number before it another one, or the answer a list.
_CONTINUED = re.compile(
    rf"""(?ix)\s*(?:\?
    |(?:\\[A-Za-z]+|[^\w(]){{0,8}}[0-9]|\(\s*\$?[0-9][0-9.,]*\s*\)
    |(?:squared|cubed|factorial|halves|thirds|fourths|tens|{_FRACTIONS}|below\s+zero|or\s+(?:more|less|fewer|greater))\b
    |(?:%|percent)\s*of\s+\$?[0-9]|(?:more|less|fewer|greater|higher|lower)\s+than\s+\$?[0-9]
    |(?:is|was)\s+(?:wrong|incorrect|not)\b|to\s+\$?[0-9]
    |(?:[a-z]{{1,20}}\s+)?(?:plus|minus|times|multiplied\s+by|divided\s+by|choose|to\s+the|then)\s+\$?[0-9]
    |x\s?[0-9]
    |{_LARGE}\s*,?\s*(?:and\s+)?\$?[0-9]+\s*{_SMALL}\b|(?!{_JOINTS}\b)[a-z]{{1,20}}\s+\$?[0-9])"""
)
_OTHER = re.compile(
    r"(?i)\W{0,3}(?P<unit>[a-z]{0,20})\W{0,3}\b(?:or|maybe|perhaps|possibly)\b[^0-9]{0,20}[0-9.,]{1,40}%?\W{0,3}(?P<other>[a-z]{0,20})"
)
_VERB = re.compile(r"(?i)\b(?:is|are|equals?|was)\b|=|:")
_REMARK = re.compile(r"\s+\((?!\s?(?:(?:or|not|and|maybe|perhaps)\b|\$?[0-9.,]+\s?\)))(?=[^()]{0,200}\)[\s.]{0,4}$)")
_RAISED = re.compile(r"(?<=[A-Za-z)])\s?\^\s?[0-9]+|(?<=[A-WYZa-wyz])[23](?![0-9])")


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
    text = _without_remark(text.strip()[:MAX_LINE]).rstrip("!")
    if compare.equal(gold, text):
        return True
    typed = _typed(text)
    if typed is not None:
        return False
    number = first_number(text)
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


def first_number(text: str) -> str | None:
    """Returns the number of a sentence, as plain text.

    The result is None if there is none, or if it is part of an operation, a bound, or one of several.
    """
    text = translate(text)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    text = _SIGNED.sub("-", _RAISED.sub("", text))
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
    if _BOUND.search(before) or _is_continued(text, found.end()):
        return None
    scale = _SCALE.match(text, found.end())
    factor = f"*{_POWERS[scale.lastgroup]}" if scale else "+1/2" if _HALF.match(text, found.end()) else ""
    sign = "-" if bool(found["minus"]) != bool(found["inner"]) else ""
    number = f"{found['whole'].translate(_SEPARATORS)}{found['point'] or ''}{found['fraction'] or ''}"
    return f"{sign}({number}{factor})" if factor else f"{sign}{number}"


def _is_continued(text: str, end: int) -> bool:
    """Returns whether the text after a number makes it another one, or names a second answer: 15 or 16."""
    if _CONTINUED.match(text, end):
        return True
    found = _OTHER.match(text, end)
    # 2 hours or 120 minutes are one answer.
    return found is not None and not (found["unit"] and found["other"] and found["unit"] != found["other"])
