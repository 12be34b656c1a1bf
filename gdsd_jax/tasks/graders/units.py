r"""Separates a number from its unit, and reads words that are part of the number: percent, thousand, a dozen.

A unit is the words after a number up to the end: `5 \text{ cm}^2`, `$36`, `18 dollars per day`. Two different units
make two different answers; an answer without a unit has the unit of the question.
"""

from fractions import Fraction
from typing import NamedTuple

from gdsd_jax.tasks.graders.tokens import FUNCTIONS, Token

# Words that say more than a unit: an answer with one of them is not its number alone.
SENTENCE = {
    "if", "when", "where", "whenever", "otherwise", "unless", "not", "than", "least", "most", "less", "more", "for",
    "except", "but", "no", "is", "are", "mod", "modulo", "base", "between", "through", "such", "with", "without", "all",
    "any", "every", "only", "times", "over", "minus", "plus", "divided", "multiplied", "remainder", "or", "and",
    "either", "both", "to", "from", "undefined", "solutions", "solution", "below", "negative", "wrong", "incorrect",
    "out", "by", "add", "added", "subtract", "subtracted", "maybe", "perhaps", "possibly", "choose", "greater", "fewer",
    "instead",
}  # fmt: skip
SCALES = {
    "hundred": 100, "thousand": 1000, "million": 10**6, "millions": 10**6, "billion": 10**9, "billions": 10**9,
    "trillion": 10**12, "dozen": 12, "dozens": 12, "half": Fraction(1, 2), "halves": Fraction(1, 2),
    "thirds": Fraction(1, 3), "third": None, "quarters": Fraction(1, 4), "quarter": None, "fourths": Fraction(1, 4),
    "fifths": Fraction(1, 5), "sixths": Fraction(1, 6), "sevenths": Fraction(1, 7), "eighths": Fraction(1, 8),
    "ninths": Fraction(1, 9), "tenths": Fraction(1, 10), "twelfths": Fraction(1, 12), "hundredths": Fraction(1, 100),
    "thousandths": Fraction(1, 1000), "tens": None,
}  # fmt: skip
_ORDINALS = {"st", "nd", "rd", "th"}
_NAMES = {
    "cm": "centimeter", "mm": "millimeter", "km": "kilometer", "m": "meter", "kg": "kilogram", "mg": "milligram",
    "g": "gram", "gm": "gram", "ml": "milliliter", "l": "liter", "in": "inch", "inches": "inch", "ft": "foot",
    "feet": "foot", "yd": "yard", "mi": "mile", "lb": "pound", "lbs": "pound", "oz": "ounce", "hr": "hour",
    "hrs": "hour", "h": "hour", "s": "second", "sec": "second", "secs": "second", "min": "minute", "mins": "minute",
    "mph": "mile/hour", "kph": "kilometer/hour", "kmh": "kilometer/hour", "sq": "square", "squared": "square",
    "metre": "meter", "metres": "meter", "litre": "liter", "litres": "liter", "centimetre": "centimeter",
    "centimetres": "centimeter", "kilometre": "kilometer", "kilometres": "kilometer", "usd": "dollar",
    "deg": "degree", "cubed": "cubic", "people": "person", "men": "man", "women": "woman", "children": "child",
    "yr": "year", "yrs": "year", "rad": "radian", "per": "/", "an": "", "a": "", "of": "of", "the": "",
}  # fmt: skip
# Words that are operations if they follow a number: 5 squared is no 5.
_OPERATIONS = {"squared", "cubed", "factorial", "choose", "R"}
_RATES = {"per", "every", "each"}
_GENERIC = {"", "unit", "square unit", "unit^2", "cubic unit", "unit^3"}
_BETWEEN = {"^", "/", "(", ")", "{", "}", "-", ".", "*", "'", "["}


class Measured(NamedTuple):
    """A number's tokens and its unit in one spelling; the unit is empty if there is none with a meaning."""

    tokens: list[Token]
    unit: str = ""
    percent: bool = False
    scale: Fraction = Fraction(1)


def split(tokens: list[Token]) -> Measured:
    """Returns a number separated from its unit, or the unchanged tokens if they do not end in a unit."""
    money = [token.text.partition(":")[2] for token in tokens if token.text.startswith("currency:")]
    tokens = [token for token in tokens if not token.text.startswith("currency:")]
    start = next((index for index, token in enumerate(tokens) if index and _begins(tokens, index)), len(tokens))
    tail = tokens[start:]
    if start < len(tokens) and not _is_unit(tail):
        return Measured(tokens)
    head, scale = tokens[:start], Fraction(1)
    while tail and tail[0].kind == "word" and SCALES.get(tail[0].text.lower()):
        scale *= SCALES[tail.pop(0).text.lower()]
    unit = _spelled(tail) if tail else ""
    percent = bool(head) and (head[-1].kind, head[-1].text) == ("sign", "%")
    if percent:
        head = head[:-1]
    elif head and head[-1].text == "degree" and not unit and FUNCTIONS.isdisjoint(token.text for token in head):
        unit = "degree"
    if money and not unit:
        unit = money[0]
    return Measured(head, unit, percent, scale)


def agree(one: str, other: str) -> bool:
    """Returns whether the units do not contradict each other; an absent unit agrees with every unit."""
    return one == other or one in _GENERIC or other in _GENERIC


def _begins(tokens: list[Token], index: int) -> bool:
    """Returns whether a unit begins here: a word, or a letter written as text, after a number."""
    token, before = tokens[index], tokens[index - 1]
    if token.kind == "word":
        return True
    return token.kind == "symbol" and token.written and not (before.kind == "symbol" or before.text in ("(", "_", "="))


def _is_unit(tail: list[Token]) -> bool:
    words = [token.text.lower() for token in tail if token.kind == "word"]
    if any(word in SENTENCE or (word in SCALES and SCALES[word] is None) for word in words):
        return False
    if tail[0].text in _OPERATIONS:
        return False
    return all(
        _is_power(tail, index)
        if token.kind == "number"
        else token.kind == "word" or token.written or token.text in _BETWEEN or token.text in ("degree", *"hsm")
        for index, token in enumerate(tail)
    )


def _is_power(tail: list[Token], index: int) -> bool:
    """Returns whether a number in a unit is a power, as in cm^2 and cm2, or counts a rate, as in "per 2 weeks".

    Any other number is a second answer, as in "5 feet 6 inches".
    """
    before = [token.text for token in tail[:index] if token.text not in ("{", "(", "-")]
    if not before or before[-1] in ("^", "/", *_RATES):
        return bool(before)
    ends = index + 1 == len(tail) or tail[index + 1].text in ("/", "}", ")", ".")
    return tail[index].text in ("2", "3") and before[-1] in {*_NAMES, "m"} and ends


def _spelled(tail: list[Token]) -> str:
    half = "".join(token.text for token in tail if token.text.isalpha()).lower()
    if half in ("am", "pm"):
        return half
    parts = []
    for token in tail:
        text = token.text.lower() if token.kind == "word" else token.text
        if text in ("{", "}", ".", "(", ")", "[", ""):
            continue
        if text in _ORDINALS and not parts:
            return ""
        name = _NAMES.get(text)
        if name is None and len(text) > 3 and text.endswith("s") and not text.endswith("ss"):
            name = _NAMES.get(text[:-1], text[:-1])
        parts.append(text if name is None else name)
    text = " ".join(filter(None, parts)).replace(" ^ ", "^").replace(" / ", "/")
    for power, word in (("2", "square"), ("3", "cubic")):
        for name in text.split():
            if name.endswith(f"^{power}"):
                text = text.replace(name, f"{word} {name[:-2]}")
    words = text.split()
    if len(words) == 2 and words[1] in ("square", "cubic"):
        text = f"{words[1]} {words[0]}"
    return text
