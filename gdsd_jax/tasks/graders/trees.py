"""Defines the trees of expressions.

A tree is a tuple: ("number", Fraction, decimals), ("symbol", name), ("constant", name), (operator, tree, tree) for
+ - * / ^, ("function", name, trees...), ("unknown", name, trees...) for f(x), ("degree", tree). `decimals` counts the
digits after the point and is None for a whole number.
"""

from fractions import Fraction
from typing import Any

from gdsd_jax.tasks.graders.tokens import Unreadable

Tree = tuple[Any, ...]

MAX_DIGITS = 400
MAX_EXPONENT = 400  # of scientific notation such as 1e9


def number(text: str) -> Tree:
    """Returns the tree of a written number: digits, with a point or an exponent of ten."""
    mantissa, _, exponent = text.lower().partition("e")
    if len(mantissa) > MAX_DIGITS or len(exponent) > 4 or abs(int(exponent or 0)) > MAX_EXPONENT:
        raise Unreadable("too large")
    decimals = len(mantissa.partition(".")[2]) if "." in mantissa else None
    return ("number", Fraction(text), None if exponent else decimals)


def symbols(tree: Any) -> set[str]:
    """Returns the names of the symbols in a tree, including unknown functions."""
    if not isinstance(tree, tuple) or not tree:
        return set()
    own = {tree[1]} if tree[0] in ("symbol", "unknown") else set()
    return own.union(*map(symbols, tree[1:]))
