"""Computes values of expressions, exactly if they are rational, and decides whether two expressions are equal.

Rational arithmetic is exact. Other numbers are computed to more digits than the expressions' own numbers have, and
expressions with symbols are compared at fixed rational points: two different ones agree at none, or hardly any.
Values too large to compute are refused, so that every comparison is short.
"""

import random
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import mpmath
from mpmath import mp

from gdsd_jax.tasks.graders.functions import (
    ANGLES,
    ARITY,
    FUNCTIONS,
    MAX_BITS,
    TooLarge,
    Undefined,
    Value,
    power,
    real,
    unknown,
)
from gdsd_jax.tasks.graders.trees import Tree, symbols

MAX_PRECISION = 10_000
# The bound on bits times nodes of the trees, beyond which a higher precision would take seconds.
MAX_WORK = 1_000_000
PRECISION = 250
POINTS = 5
TRIES = 40
# Points at which a value may be too large to compute, before an expression is refused.
OVERFLOWS = 2
# The share of the bits in which two equal numbers agree at least.
_TOLERANCE = 2 / 3


class _Evaluator:
    """Computes values at one point. `bits` is the size of the largest number so far; results need more precision."""

    def __init__(self, point: Mapping[str, Fraction]):
        self.point = point
        self.bits = 0

    def value(self, tree: Tree) -> Value:
        result = self._value(tree)
        if isinstance(result, Fraction):
            size = max(result.numerator.bit_length(), result.denominator.bit_length())
        else:
            if not (mp.isfinite(result.real) and mp.isfinite(result.imag)):
                raise Undefined
            size = abs(int(mp.mag(result))) if result else 0
        if size > MAX_BITS:
            raise TooLarge
        self.bits = max(self.bits, size)
        return result

    def _value(self, tree: Tree) -> Value:
        kind = tree[0]
        if kind == "number":
            return tree[1]
        if kind == "symbol":
            return self.point[tree[1]]
        if kind == "constant":
            if tree[1] == "infty":
                raise Undefined
            return {"pi": +mp.pi, "e": +mp.e, "i": mpmath.mpc(0, 1)}[tree[1]]
        if kind == "degree":
            return self.value(tree[1])
        if kind == "unknown":
            return unknown(tree[1], [self.value(part) for part in tree[2:]])
        if kind == "function":
            return self.function(tree[1], tree[2:])
        left, right = self.value(tree[1]), self.value(tree[2])
        if kind == "^":
            return power(left, right)
        if not (isinstance(left, Fraction) and isinstance(right, Fraction)):
            left, right = real(left), real(right)
        if kind == "/":
            if right == 0:
                raise Undefined
            return left / right
        return {"+": lambda: left + right, "-": lambda: left - right, "*": lambda: left * right}[kind]()

    def function(self, name: str, arguments: tuple[Tree, ...]) -> Value:
        if name in ANGLES:
            degrees, tree = _in_degrees(arguments[0])
            value = real(self.value(tree))
            return ANGLES[name](value * mp.pi / 180 if degrees else value)
        values = [self.value(argument) for argument in arguments]
        if name in ARITY and not ARITY[name][0] <= len(values) <= ARITY[name][1]:
            raise Undefined
        return FUNCTIONS[name](*values)


def _in_degrees(tree: Tree) -> tuple[bool, Tree]:
    """Returns whether an angle has a degree sign, and the angle without it."""
    if tree[0] == "degree":
        return True, tree[1]
    if tree[0] in ("+", "-", "*", "/") and any(_in_degrees(part)[0] for part in tree[1:]):
        return True, (tree[0], *(_in_degrees(part)[1] for part in tree[1:]))
    return False, tree


def exact(tree: Tree) -> Fraction | None:
    """Returns the rational value of a tree without symbols, or None if this arithmetic finds none."""
    try:
        with mp.workprec(PRECISION):
            value = None if symbols(tree) else _Evaluator({}).value(tree)
    except (ArithmeticError, ValueError, RecursionError):
        return None
    return value if isinstance(value, Fraction) else None


def approximate(tree: Tree) -> Value | None:
    """Returns the value of a tree without symbols as a number of mpmath, or None."""
    try:
        with mp.workprec(PRECISION):
            return None if symbols(tree) else real(_Evaluator({}).value(tree))
    except (ArithmeticError, ValueError, RecursionError):
        return None


def points(names: set[str]) -> list[dict[str, Fraction]]:
    """Returns fixed rational points for the comparison of expressions in these symbols; every other one is positive.

    Two of five are large, one of them negative: |x + 5| equals x + 5 at the small ones, and sqrt(x - 5) is not real.
    """
    draw = random.Random(7)
    found = []
    for index in range(TRIES if names else 1):
        point = {}
        for name in sorted(names):
            value = Fraction(draw.randint(300, 3000), 1009)
            point[name] = -value if index % 2 and draw.random() < 0.7 else value
            if index % 5 > 2:
                point[name] = value * (37 if index % 5 == 3 else -37)
        found.append(point)
    return found


def values_at(trees: list[Tree], point: Mapping[str, Fraction]) -> list[Value]:
    """Returns the trees' values at a point, and the precision in bits, which exceeds the size of every number in them.

    Raises Undefined or TooLarge.
    """
    needed = PRECISION
    for _ in range(3):
        precision = needed
        with mp.workprec(precision):
            evaluator = _Evaluator(point)
            found = [evaluator.value(tree) for tree in trees]
        needed = PRECISION + 3 * evaluator.bits
        if all(isinstance(value, Fraction) for value in found) or needed <= precision:
            break
        if needed > MAX_PRECISION or needed * sum(map(_size, trees)) > MAX_WORK:
            raise TooLarge
    return [*found, precision]


def _size(tree: Any) -> int:
    """Counts the nodes of a tree."""
    return 1 + sum(map(_size, tree)) if isinstance(tree, tuple) else 0


def _same(left: Value, right: Value, precision: int) -> bool:
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left == right
    with mp.workprec(precision):
        left, right = real(left), real(right)
        scale = max(1, abs(left), abs(right))
        return abs(left - right) < scale * mpmath.ldexp(1, -int(precision * _TOLERANCE))


def _is_complex(value: Value, precision: int) -> bool:
    if isinstance(value, (Fraction, mpmath.mpf)):
        return False
    return abs(value.imag) > max(1, abs(value)) * mpmath.ldexp(1, -int(precision * _TOLERANCE))


def _has_i(tree: Any) -> bool:
    return isinstance(tree, tuple) and (tree[:2] == ("constant", "i") or any(map(_has_i, tree)))


def equal(left: Tree, right: Tree) -> bool:
    """Returns whether two expressions are equal wherever both are real."""
    if left == right:
        return True
    names = symbols(left) | symbols(right)
    complex_counts = not names or _has_i(left) or _has_i(right)
    agreed = overflows = 0
    for point in points(names):
        try:
            one, other, precision = values_at([left, right], point)
        except TooLarge:
            overflows += 1
            if overflows > OVERFLOWS or not names:
                return False
            continue
        except (ArithmeticError, ValueError, TypeError, KeyError):
            continue
        if not complex_counts and (_is_complex(one, precision) or _is_complex(other, precision)):
            continue
        if not _same(one, other, precision):
            return False
        agreed += 1
        if agreed == (POINTS if names else 1):
            return True
    return False


def proportional(left: Tree, right: Tree) -> Value | None:
    """Returns the constant c with right = c * left at all points, or None if there is none or it is 0."""
    names = symbols(left) | symbols(right)
    first, agreed, overflows = None, 0, 0
    for point in points(names):
        try:
            one, other, precision = values_at([left, right], point)
        except TooLarge:
            overflows += 1
            if overflows > OVERFLOWS or not names:
                return None
            continue
        except (ArithmeticError, ValueError, TypeError, KeyError):
            continue
        if _is_complex(one, precision) or _is_complex(other, precision) or not one or not other:
            continue
        with mp.workprec(precision):
            exact_ratio = isinstance(one, Fraction) and isinstance(other, Fraction)
            ratio = other / one if exact_ratio else real(other) / real(one)
        if first is None:
            first = ratio
        elif not _same(first, ratio, precision):
            return None
        agreed += 1
        if agreed == (POINTS if names else 1):
            return first
    return None
