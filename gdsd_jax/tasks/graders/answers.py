r"""Reads the type and the value of an answer from its tokens.

An answer is a number with its unit, a list, a tuple, a set or interval, a relation, a matrix, a number in another base,
a ratio or time, or words. Any other answer is kept as its tokens in one spelling, and equals only that spelling.
"""

import functools

from gdsd_jax.tasks.graders import units
from gdsd_jax.tasks.graders.kinds import (
    EMPTY,
    REALS,
    Answer,
    Based,
    Matrix,
    Opaque,
    Ratio,
    Relation,
    Residue,
    Scalar,
    Sequence,
    Union,
)
from gdsd_jax.tasks.graders.syntax import parse
from gdsd_jax.tasks.graders.tokens import Token, Unreadable, flat, tokenize
from gdsd_jax.tasks.graders.trees import number

RELATIONS = {
    "=": "=", "<": "<", ">": ">", "le": "<=", "ge": ">=", "ne": "!=", "in": "in", "notin": "notin", "equiv": "=",
    "approx": "approx",
}  # fmt: skip
_OPENING = {"(", "[", "{", "\\{", "langle", "lfloor", "lceil"}
_CLOSING = {")", "]", "}", "\\}", "rangle", "rfloor", "rceil"}
_MATRICES = {"pmatrix", "bmatrix", "Bmatrix", "matrix", "smallmatrix"}
_CALLED = set("ABCDEIJKLMNOPQRSTUVWXYZpqrsuvw")
_ENDS = (".", ",", ";", ":", "\\", "*", "&", "^", "only")
_TAIL = ["is", "the", "answer"]
_NOTHING = {"noneofthese", "nosolution", "nosolutions", "norealsolution", "norealsolutions"}


@functools.lru_cache(maxsize=512)
def read(text: str, loose: bool = True) -> Answer:
    """Returns the answer that a text gives.

    See `tokenize` for `loose`. Raises Unreadable if the text has no tokens.
    """
    tokens = strip(tokenize(text, loose))
    if not tokens:
        raise Unreadable("empty")
    return read_tokens(tokens)


def strip(tokens: list[Token]) -> list[Token]:
    """Returns the tokens without an introduction or an end of sentence around the answer.

    These are "The answer is", "is the answer", "=", a period, "only", or braces around everything.
    """
    while True:
        before = len(tokens)
        while tokens and (tokens[-1].text in _ENDS and tokens[-1].kind != "number"):
            tokens = tokens[:-1]
        while tokens and tokens[0].text in ("=", ":", "*", ".", "\\", "approx", "&", ",", "^"):
            tokens = tokens[1:]
        tokens = tokens[: -len(_TAIL)] if [token.text.lower() for token in tokens[-len(_TAIL) :]] == _TAIL else tokens
        words = [token.text.lower() for token in tokens[:8]]
        lead = words.index("answer") + 1 if "answer" in words else 0
        if lead and all(token.kind == "word" or token.text == "," for token in tokens[:lead]):
            rest = tokens[lead:]
            if rest and rest[0].text in ("is", "are", ":", "="):
                tokens = rest[1:]
        if len(tokens) > 1 and words[0] in ("option", "choice"):
            tokens = tokens[1:]
        if len(tokens) > 1 and tokens[0].text == "{" and _matching(tokens, 0) == len(tokens) - 1:
            tokens = tokens[1:-1]
        if len(tokens) == before:
            return tokens


def _matching(tokens: list[Token], start: int) -> int:
    """Returns the index of the bracket, of any kind, that closes the one at `start`; -1 if none does."""
    depth = 0
    for index in range(start, len(tokens)):
        kind, text, _ = tokens[index]
        if kind != "number" and (text in _OPENING or text.startswith("begin:")):
            depth += 1
        elif kind != "number" and (text in _CLOSING or text.startswith("end:")):
            depth -= 1
            if depth == 0:
                return index
    return -1


def _top(tokens: list[Token]) -> list[int]:
    """Returns the indices of the tokens outside all brackets; bars of absolute values count as brackets."""
    found, index, bars = [], 0, False
    while index < len(tokens):
        kind, text, _ = tokens[index]
        if kind != "number" and (text in _OPENING or text.startswith("begin:")):
            end = _matching(tokens, index)
            if end < 0:
                raise Unreadable("a bracket never closes")
            index = end
        elif (kind, text) == ("sign", "|"):
            bars = not bars
        elif not bars:
            found.append(index)
        index += 1
    return found


def _cut(tokens: list[Token], indices: list[int]) -> list[list[Token]]:
    """Returns the parts between the tokens at these indices."""
    edges = [-1, *indices, len(tokens)]
    return [tokens[start + 1 : end] for start, end in zip(edges, edges[1:], strict=False)]


def read_tokens(tokens: list[Token]) -> Answer:
    """Returns the answer that these tokens give."""
    try:
        found = _typed(tokens) if tokens else None
    except (Unreadable, RecursionError):
        found = None
    return found if found is not None else opaque(tokens)


def opaque(tokens: list[Token]) -> Opaque:
    """Returns the tokens as one string: words in lower case, without an article in front."""
    tokens = [token for token in tokens if token.text not in ("{", "}")]
    if len(tokens) > 1 and tokens[1].kind == "word" and tokens[0].text in ("a", "an", "the", "An", "The"):
        tokens = tokens[1:]
    text = flat(tokens)
    if text in _NOTHING:
        return Opaque("emptyset")
    if text == "allrealnumbers":
        return REALS
    kinds = [token.kind in ("word", "separator") or token.text in ("(", ")", "-", "'", ".", ",") for token in tokens]
    return Opaque(text, all(kinds))


def _typed(tokens: list[Token]) -> Answer | None:
    top = _top(tokens)
    texts = {tokens[index].text for index in top if tokens[index].kind in ("sign", "command", "separator")}
    if any(token.kind == "word" and token.text.lower() in ("if", "when", "otherwise", "where") for token in tokens):
        return None
    separators = _separators(tokens, top)
    if separators:
        return _list(tokens, separators)
    if texts & {"pmod", "bmod", "mod"}:
        return _residue(tokens, top)
    signs = [index for index in top if tokens[index].kind in ("sign", "command") and tokens[index].text in RELATIONS]
    if signs:
        return _relation(tokens, signs)
    for sign in ("setminus", "cup", "cap"):
        joints = [index for index in top if tokens[index].text == sign or (sign == "cup" and _is_cup(tokens, index))]
        if joints:
            return Union(tuple(read_tokens(part) for part in _cut(tokens, joints)), sign)
    colons = [index for index in top if tokens[index][:2] in (("sign", ":"), ("word", "to"))]
    if colons:
        return _ratio(tokens, colons)
    opens = tokens[0].text in _OPENING or tokens[0].text.startswith("begin:")
    whole = opens and _matching(tokens, 0) == len(tokens) - 1
    if tokens[0].text.startswith("begin:"):
        return _matrix(tokens) if whole else None
    if whole and tokens[0].kind in ("sign", "command"):
        inner = _bracketed(tokens)
        if inner is not None:
            return inner
    based = _based(tokens)
    return based if based is not None else _scalar(tokens)


def _is_cup(tokens: list[Token], index: int) -> bool:
    """Returns whether the token is a capital U between two intervals."""
    inside = 0 < index < len(tokens) - 1 and tokens[index].text == "U"
    return inside and tokens[index - 1].text in (")", "]", "\\}") and tokens[index + 1].text in ("(", "[", "\\{")


def _separators(tokens: list[Token], top: list[int]) -> list[int]:
    """Returns those of the indices in `top` whose token is a comma, a semicolon, "and" or "or"."""
    signs = (("sign", ","), ("sign", ";"))
    return [index for index in top if tokens[index].kind == "separator" or tokens[index][:2] in signs]


def _list(tokens: list[Token], separators: list[int]) -> Answer | None:
    joints = [tokens[index].text for index in separators if tokens[index].kind == "separator"]
    parts = [part for part in _cut(tokens, separators) if part and any(token.text != "{" for token in part)]
    items = tuple(read_tokens(strip(part)) for part in parts if strip(part))
    if len(items) == 1 and len(separators) == 1:
        return items[0]
    if not items or any(isinstance(item, Opaque) and item.words and len(parts) > 8 for item in items):
        return None
    return Sequence(items, joint=joints[0] if joints else ",")


def _residue(tokens: list[Token], top: list[int]) -> Answer | None:
    index = next(i for i in top if tokens[i].text in ("pmod", "bmod", "mod"))
    value, modulus = strip(tokens[:index]), strip(tokens[index + 1 :])
    if value and value[-1].text == "(":
        return None
    return Residue(read_tokens(value), read_tokens(modulus)) if value and modulus else None


def _relation(tokens: list[Token], signs: list[int]) -> Answer | None:
    parts = _cut(tokens, signs)
    names = tuple(RELATIONS[tokens[index].text] for index in signs)
    if not parts[0]:
        parts[0] = [Token("symbol", "")]
    if not all(parts):
        return None
    return Relation(tuple(_call(part) or read_tokens(part) for part in parts), names)


def _call(tokens: list[Token]) -> Scalar | None:
    """Reads P(x) and P(3) as a side of a relation: there they are calls, while P(x + 1) may be a product."""
    if [token.text for token in tokens[1::2]] != ["(", ")"] or len(tokens) != 4:
        return None
    name, argument = tokens[0], tokens[2]
    if name.kind != "symbol" or name.text not in _CALLED or argument.kind not in ("symbol", "number"):
        return None
    return Scalar((("unknown", name.text, parse([argument])[0]),))


def _ratio(tokens: list[Token], colons: list[int]) -> Answer | None:
    parts, half = _cut(tokens, colons), ""
    tail = flat(parts[-1]).replace(".", "")
    for name in ("am", "pm"):
        if tail.endswith(name) and tail[: -len(name)].isdigit():
            half, parts[-1] = name, parts[-1][:1]
    parts = [strip(part) for part in parts]
    if not all(parts):
        return None
    return Ratio(tuple(read_tokens(part) for part in parts), tuple(flat(part) for part in parts), half)


def _matrix(tokens: list[Token]) -> Answer | None:
    if tokens[0].text.removeprefix("begin:") not in _MATRICES | {"array"}:
        return None
    rows: list[list[list[Token]]] = [[[]]]
    for index, token in enumerate(tokens[1:-1], start=1):
        if token.kind == "command" and token.text == "\\":
            rows.append([[]])
        elif token[:2] == ("sign", "&"):
            rows[-1].append([])
        elif token.text != "hline" and not (token.text == "{" and tokens[index - 1].text == "hline"):
            rows[-1][-1].append(token)
    rows = [row for row in rows if any(row)]
    if not rows or not all(all(row) for row in rows):
        return None
    return Matrix(tuple(tuple(read_tokens(cell) for cell in row) for row in rows))


def _bracketed(tokens: list[Token]) -> Answer | None:
    """Reads a tuple, an interval or a set; returns None for the parentheses of an expression."""
    opening, closing, inner = tokens[0].text, tokens[-1].text, tokens[1:-1]
    pair = {"\\{": "{", "langle": "("}.get(opening, opening), {"\\}": "}", "rangle": ")"}.get(closing, closing)
    if not inner:
        return EMPTY if pair == ("{", "}") else None
    separators = _separators(inner, _top(inner))
    if separators:
        items = tuple(read_tokens(part) for part in _cut(inner, separators) if part)
        return Sequence(items, *pair)
    if pair == ("{", "}") and opening != "{":
        bar = next((index for index, token in enumerate(inner) if token[:2] in (("sign", "|"), ("sign", ":"))), None)
        if bar is not None:  # {x | x > 5}
            condition = read_tokens(inner[bar + 1 :]) if bar else None
            return condition if isinstance(condition, (Relation, Sequence)) else None
        return Sequence((read_tokens(inner),), *pair)
    if pair in (("(", ")"), ("{", "}"), ("[", "]")):
        return read_tokens(strip(inner))
    return None


def _based(tokens: list[Token]) -> Based | Scalar | None:
    """Reads 2516_8, 2516_{8}, (2516)_8, 3A_{16}, 11_{\\text{two}}, 2516 (base 8), and 13_{10} as 13."""
    if any(token.kind == "word" and token.text.lower() == "base" for token in tokens):
        tokens = [token for token in tokens if token.text not in ("(", ")", "{", "}", "_")]
    for index, token in enumerate(tokens):
        if token[:2] == ("sign", "_"):
            digits = flat([part for part in tokens[:index] if part.text not in ("(", ")", "{", "}")])
            base = flat([part for part in tokens[index + 1 :] if part.text not in ("(", ")", "{", "}")])
            base = str(_BASES[base]) if base in _BASES else base
            if base == "10" and digits.isascii() and digits.isdigit():
                return Scalar((number(digits),))
            if digits and digits[0].isdigit() and digits.isalnum() and base.isdigit():
                return Based(digits.upper(), base)
            return None
        if token.kind == "word" and token.text.lower() == "base" and index + 2 == len(tokens):
            digits = flat(tokens[:index])
            if digits.isdigit() and tokens[-1].text.isdigit():
                return Based(digits, tokens[-1].text)
    return None


_NUMERALS = "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
_BASES = {name: number for number, name in enumerate(_NUMERALS.split(), start=2)}


def _scalar(tokens: list[Token]) -> Answer | None:
    measured = units.split(tokens)
    if not measured.tokens:
        return None
    try:
        trees = parse(strip(measured.tokens))
    except Unreadable:
        if measured.unit or measured.tokens == tokens:
            return None
        trees = parse(tokens)
        return Scalar(tuple(trees))
    if measured.scale != 1:
        trees = [("*", ("number", measured.scale, None), tree) for tree in trees]
    return Scalar(tuple(trees), measured.unit, measured.percent)
