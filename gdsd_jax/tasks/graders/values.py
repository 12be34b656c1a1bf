"""Values of expressions, exact where they are rational, and whether two expressions are equal.

Rational arithmetic is exact. Other numbers are computed to more digits than the expressions' own numbers have, and
expressions with symbols are compared at fixed rational points: two different ones agree at none, or hardly any. What
would be too large to compute is refused, so that every comparison is short.
"""

import hashlib
import math
import random
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import mpmath
from mpmath import mp

from gdsd_jax.tasks.graders.syntax import Tree, symbols

MAX_BITS = 200_000
MAX_PRECISION = 30_000
PRECISION = 250
POINTS = 5
TRIES = 20
# Share of the bits in which two equal numbers agree at least.
_TOLERANCE = 2 / 3

Value = Any  # Fraction, mpmath.mpf or mpmath.mpc


class Undefined(ArithmeticError):
    """The expression has no value at this point."""


class TooLarge(ArithmeticError):
    """The value has too many digits to compute."""


class _Evaluator:
    """Values at one point. `bits` is the size of the largest number met: results need a precision beyond it."""

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
            return _unknown(tree[1], [self.value(part) for part in tree[2:]])
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
        if name in _ANGLES:
            degrees, tree = _in_degrees(arguments[0])
            value = real(self.value(tree))
            return _ANGLES[name](value * mp.pi / 180 if degrees else value)
        values = [self.value(argument) for argument in arguments]
        if name in _ARITY and not _ARITY[name][0] <= len(values) <= _ARITY[name][1]:
            raise Undefined
        return _FUNCTIONS[name](*values)


def real(value: Value) -> Value:
    """A number of mpmath; Fractions are rounded to the precision."""
    if isinstance(value, Fraction):
        return mpmath.mpf(value.numerator) / value.denominator
    return value


def power(base: Value, exponent: Value) -> Value:
    """base ** exponent: exact where it is rational, the real root of a negative number under an odd index."""
    if isinstance(exponent, Fraction) and exponent.denominator == 1 and isinstance(base, Fraction):
        size = max(base.numerator.bit_length(), base.denominator.bit_length())
        if size > 1 and abs(exponent.numerator) * (size - 1) > MAX_BITS:
            raise TooLarge
        if base == 0 and exponent <= 0:
            if exponent == 0:
                return Fraction(1)
            raise Undefined
        return base ** int(exponent)
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        if base < 0 and exponent.denominator % 2:
            sign = -1 if exponent.numerator % 2 else 1
            return sign * power(-base, exponent)
        root = _exact_root(base, exponent.denominator) if base >= 0 else None
        if root is not None:
            return power(root, Fraction(exponent.numerator))
    base, exponent = real(base), real(exponent)
    if base == 0:
        raise Undefined
    if abs(exponent) * (abs(mp.log(abs(base))) + 4) > MAX_BITS:
        raise TooLarge
    return mp.power(base, exponent)


def _exact_root(value: Fraction, index: int) -> Fraction | None:
    """The rational root, or None where it is irrational."""
    if index > 64:
        return None
    parts = []
    for part in (value.numerator, value.denominator):
        root = math.isqrt(part) if index == 2 else _integer_root(part, index)
        if root**index != part:
            return None
        parts.append(root)
    return Fraction(*parts)


def _integer_root(value: int, index: int) -> int:
    low, high = 0, 1 << (value.bit_length() // index + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**index <= value else (low, middle - 1)
    return low


def _root(value: Value, index: Value) -> Value:
    if not isinstance(index, Fraction) or index == 0:
        raise Undefined
    return power(value, 1 / index)


def _factorial(value: Value) -> Value:
    if isinstance(value, Fraction) and value.denominator == 1:
        if value < 0:
            raise Undefined
        if value > 20_000:
            raise TooLarge
        return Fraction(math.factorial(int(value)))
    if mp.mag(value.real if not isinstance(value, Fraction) else real(value)) > 16:
        raise TooLarge
    return mp.gamma(real(value) + 1)


def _binomial(n: Value, k: Value) -> Value:
    if all(isinstance(value, Fraction) and value.denominator == 1 for value in (n, k)):
        if n < 0 or k < 0:
            raise Undefined
        if n > 20_000:
            raise TooLarge
        return Fraction(math.comb(int(n), int(k)))
    if any(mp.mag(real(value)) > 16 for value in (n, k) if value):
        raise TooLarge
    return mp.binomial(real(n), real(k))


def _logarithm(value: Value, base: Value = None) -> Value:
    if base is None:
        base = Fraction(10)
    if value == 0 or base in (0, 1):
        raise Undefined
    return mp.log(real(value)) / mp.log(real(base))


def _natural(value: Value) -> Value:
    if value == 0:
        raise Undefined
    return mp.log(real(value))


def _exponential(value: Value) -> Value:
    if abs(real(value)) > MAX_BITS:
        raise TooLarge
    return mp.exp(real(value))


def _whole(values: tuple[Value, ...]) -> list[int]:
    if not all(isinstance(value, Fraction) and value.denominator == 1 for value in values):
        raise Undefined
    return [int(value) for value in values]


def _compared(choose: Any) -> Any:
    def function(*values: Value) -> Value:
        if not all(isinstance(value, Fraction) for value in values):
            raise Undefined
        return choose(values)

    return function


def _rounded(exact: Any, inexact: Any) -> Any:
    def function(value: Value) -> Value:
        if isinstance(value, Fraction):
            return Fraction(exact(value))
        if isinstance(value, mpmath.mpc):
            raise Undefined
        return Fraction(int(inexact(value)))

    return function


def _angle(function: Any) -> Any:
    def guarded(value: Value) -> Value:
        if mp.mag(value) > 64:
            raise TooLarge
        try:
            return function(value)
        except (ZeroDivisionError, ValueError):
            raise Undefined from None

    return guarded


_ANGLES = {name: _angle(getattr(mp, name)) for name in ("sin", "cos", "tan", "cot", "sec", "csc")}
_FUNCTIONS = {
    "asin": lambda value: mp.asin(real(value)),
    "acos": lambda value: mp.acos(real(value)),
    "atan": lambda value: mp.atan(real(value)),
    "sinh": lambda value: (_exponential(value) - _exponential(-value)) / 2,
    "cosh": lambda value: (_exponential(value) + _exponential(-value)) / 2,
    "tanh": lambda value: mp.tanh(real(value)),
    "log": _logarithm,
    "lg": _logarithm,
    "ln": _natural,
    "exp": _exponential,
    "sqrt": lambda value: _root(value, Fraction(2)),
    "root": _root,
    "abs": lambda value: abs(value),
    "factorial": _factorial,
    "binom": _binomial,
    "floor": _rounded(math.floor, mp.floor),
    "ceil": _rounded(math.ceil, mp.ceil),
    "gcd": lambda *values: Fraction(math.gcd(*_whole(values))),
    "lcm": lambda *values: Fraction(math.lcm(*_whole(values))),
    "min": _compared(min),
    "max": _compared(max),
}
_ARITY = {name: (1, 1) for name in _FUNCTIONS} | {
    "log": (1, 2), "root": (2, 2), "binom": (2, 2), "gcd": (1, 9), "lcm": (1, 9), "min": (1, 9), "max": (1, 9),
}  # fmt: skip


def _in_degrees(tree: Tree) -> tuple[bool, Tree]:
    """Whether an angle has a degree sign, and the angle without it."""
    if tree[0] == "degree":
        return True, tree[1]
    if tree[0] in ("+", "-", "*", "/") and any(_in_degrees(part)[0] for part in tree[1:]):
        return True, (tree[0], *(_in_degrees(part)[1] for part in tree[1:]))
    return False, tree


def _unknown(name: str, values: list[Value]) -> Fraction:
    """A value for f(x) that depends on f and x and on nothing else."""
    shown = [str(value) if isinstance(value, Fraction) else mpmath.nstr(value, 30) for value in values]
    digest = hashlib.sha256(f"{name}({','.join(shown)})".encode()).digest()
    return Fraction(int.from_bytes(digest[:6]), 1 << 46)


def exact(tree: Tree) -> Fraction | None:
    """The rational value of a tree without symbols, or None where it has none that this arithmetic finds."""
    try:
        with mp.workprec(PRECISION):
            value = None if symbols(tree) else _Evaluator({}).value(tree)
    except (ArithmeticError, ValueError, RecursionError):
        return None
    return value if isinstance(value, Fraction) else None


def approximate(tree: Tree) -> Value | None:
    """The value of a tree without symbols as a number of mpmath, or None."""
    try:
        with mp.workprec(PRECISION):
            return None if symbols(tree) else real(_Evaluator({}).value(tree))
    except (ArithmeticError, ValueError, RecursionError):
        return None


def points(names: set[str]) -> list[dict[str, Fraction]]:
    """Fixed rational points, for the comparison of expressions in these symbols; every other one is positive."""
    draw = random.Random(7)
    found = []
    for index in range(TRIES if names else 1):
        point = {}
        for name in sorted(names):
            value = Fraction(draw.randint(300, 3000), 1009)
            point[name] = -value if index % 2 and draw.random() < 0.7 else value
        found.append(point)
    return found


def values_at(trees: list[Tree], point: Mapping[str, Fraction]) -> list[Value]:
    """Values of the trees at a point, to a precision beyond the size of every number in them.

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
        if needed > MAX_PRECISION:
            raise TooLarge
    return [*found, precision]


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


def _has_unit(tree: Any) -> bool:
    return isinstance(tree, tuple) and (tree[:2] == ("constant", "i") or any(map(_has_unit, tree)))


def equal(left: Tree, right: Tree) -> bool:
    """Whether two expressions are equal wherever both are real."""
    if left == right:
        return True
    names = symbols(left) | symbols(right)
    complex_counts = not names or _has_unit(left) or _has_unit(right)
    agreed = 0
    for point in points(names):
        try:
            one, other, precision = values_at([left, right], point)
        except TooLarge:
            return False
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
    """The constant c with right = c * left at all points, or None where there is none or it is 0."""
    names = symbols(left) | symbols(right)
    first, agreed = None, 0
    for point in points(names):
        try:
            one, other, precision = values_at([left, right], point)
        except TooLarge:
            return None
        except (ArithmeticError, ValueError, TypeError, KeyError):
            continue
        if _is_complex(one, precision) or _is_complex(other, precision) or not one or not other:
            continue
        with mp.workprec(precision):
            ratio = other / one if isinstance(one, Fraction) and isinstance(other, Fraction) else real(other) / real(one)
        if first is None:
            first = ratio
        elif not _same(first, ratio, precision):
            return None
        agreed += 1
        if agreed == (POINTS if names else 1):
            return first
    return None
