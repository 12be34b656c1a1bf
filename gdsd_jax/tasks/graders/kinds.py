"""Defines the types of answers. Every part of an answer is again an answer."""

from typing import NamedTuple

from gdsd_jax.tasks.graders.trees import Tree


class Scalar(NamedTuple):
    """A number or expression; it has two trees if it contains plus-minus signs."""

    trees: tuple[Tree, ...]
    unit: str = ""
    percent: bool = False


class Sequence(NamedTuple):
    """Members in brackets: a tuple, an interval or a set. If `opening` is empty, a list joined by `joint`."""

    items: tuple
    opening: str = ""
    closing: str = ""
    joint: str = ","


class Relation(NamedTuple):
    """The sides of a relation and the signs between them: x = 5, 0 < x < 1, x in S."""

    sides: tuple
    signs: tuple[str, ...]


class Union(NamedTuple):
    """Sets joined by `sign`: cup, cap or setminus."""

    sets: tuple
    sign: str


class Ratio(NamedTuple):
    """A ratio or a time, whose parts colons separate; `half` is am or pm."""

    parts: tuple
    texts: tuple[str, ...]
    half: str = ""


class Based(NamedTuple):
    """Digits of a number and its base."""

    digits: str
    base: str


class Residue(NamedTuple):
    value: object
    modulus: object


class Matrix(NamedTuple):
    rows: tuple


class Opaque(NamedTuple):
    """Any other answer: its tokens in one spelling; `words` tells whether these are words and signs around them."""

    text: str
    words: bool = False


Answer = Scalar | Sequence | Relation | Union | Ratio | Based | Residue | Matrix | Opaque
REALS = Opaque("set:R")
EMPTY = Sequence((), "{", "}")
