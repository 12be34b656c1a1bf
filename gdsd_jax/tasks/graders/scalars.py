"""Decides whether two numbers are the same answer, by their units, percent signs, decimals and values.

`75%` answers 75, and 3/4 if the fraction is asked for; `7500%` does not answer 75. Decimals are exact, except that a
fraction whose decimals never end may be rounded at enough of them.
"""

from fractions import Fraction

from gdsd_jax.tasks.graders import sets, units, values
from gdsd_jax.tasks.graders.kinds import Scalar
from gdsd_jax.tasks.graders.trees import Tree

_DEGREE: Tree = ("/", ("constant", "pi"), ("number", Fraction(180), None))
# Digits that a rounded decimal of 1/3 needs at least, and those from which it may be cut off instead of rounded.
ROUNDED, CUT = 6, 10


def same(gold: Scalar, answer: Scalar) -> bool:
    """Returns whether two expressions of one tree each are the same number, in units that may go together."""
    (one,), (other,) = gold.trees, answer.trees
    if _is_angle(gold, answer):
        return values.equal(("*", one, _DEGREE), other)
    if _is_angle(answer, gold):
        return values.equal(one, ("*", other, _DEGREE))
    if not units.agree(gold.unit, answer.unit):
        return False
    if gold.percent != answer.percent and (answer if gold.percent else gold).unit:
        return False
    if sets.infinite(one) or sets.infinite(other):
        return sets.infinite(one) == sets.infinite(other)
    if gold.percent == answer.percent:
        return values.equal(one, other) or _is_rounded(one, other)
    share = ("/", one if gold.percent else other, ("number", Fraction(100), None))
    value = values.exact(share if gold.percent else one)
    if gold.percent:
        whole = value is not None and value.denominator == 1
        return values.equal(one, other) or (not whole and values.equal(share, other))
    as_share = values.equal(one, share)
    if value is None:
        return as_share
    if value.denominator == 1:
        return values.equal(one, other)
    return as_share or (abs(value) > 1 and values.equal(one, other))


def _is_angle(one: Scalar, other: Scalar) -> bool:
    """Returns whether the first is in degrees and the second in radians, which it says or shows by a multiple of pi."""
    return one.unit == "degree" and (other.unit == "radian" or (not other.unit and _has_pi(other.trees[0])))


def _has_pi(tree: object) -> bool:
    return isinstance(tree, tuple) and (tree == ("constant", "pi") or any(map(_has_pi, tree)))


def rounds(exact: Scalar, shown: Scalar) -> bool:
    """Returns whether the second, a written number, is the first, a number, rounded to as many decimals as it has.

    It may also be cut off after two decimals or more: 0.66 for 2/3.
    """
    (one,), (other,) = exact.trees, shown.trees
    literal = other[2] if other[0] == "-" and values.exact(other[1]) == 0 else other
    value, found = values.approximate(one), values.approximate(other)
    if literal[0] != "number" or value is None or found is None:
        return False
    decimals = literal[2] or 0
    return exact.percent == shown.percent and bool(abs(value - found) * 10**decimals <= (0.5 if decimals < 2 else 1))


def _is_rounded(gold: Tree, answer: Tree) -> bool:
    """Returns whether a decimal of enough digits rounds or cuts off a fraction without end: 0.333333 for 1/3."""
    negative = answer[0] == "-" and values.exact(answer[1]) == 0
    literal = answer[2] if negative else answer
    if literal[0] != "number" or literal[2] is None:
        return False
    value, found = values.exact(gold), -literal[1] if negative else literal[1]
    if value is None or _ends(value.denominator):
        return False
    unit = Fraction(1, 10 ** literal[2])
    digits = len(str(abs(found) // unit)) if found else 0
    error = abs(value - found)
    return (digits >= ROUNDED and error <= unit / 2) or (digits >= CUT and error < unit)


def _ends(denominator: int) -> bool:
    """Returns whether the decimal expansion of a fraction with this denominator ends."""
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator == 1
