r"""Sets of real numbers, from intervals, inequalities and memberships: (5, \infty), x > 5, x \in (5, \infty) are one.

Only solved forms are read: a symbol alone between bounds, or alone in an absolute value. `2x > 10` is not solved.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from mpmath import mp

from gdsd_jax.tasks.graders import values
from gdsd_jax.tasks.graders.kinds import EMPTY, REALS, Answer, Opaque, Relation, Scalar, Sequence, Union
from gdsd_jax.tasks.graders.trees import Tree, symbols

_INFINITY: Tree = ("constant", "infty")
_ZERO: Tree = ("number", 0, None)
_FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "!=": "!=", "=": "="}


class Bound(NamedTuple):
    """An end of an interval; `place` orders it, `tree` is its exact value."""

    place: Any
    tree: Tree
    closed: bool


class Interval(NamedTuple):
    low: Bound
    high: Bound


class RealSet(NamedTuple):
    """Disjoint intervals from left to right, and the name of the symbol that lies in them, which may be empty."""

    intervals: tuple[Interval, ...]
    name: str = ""


_LEAST = Bound(-mp.inf, ("-", _ZERO, _INFINITY), False)
_MOST = Bound(mp.inf, _INFINITY, False)


def infinite(tree: Tree) -> int:
    """Returns 1 or -1 for infinity and minus infinity, else 0."""
    if tree == _INFINITY:
        return 1
    return -1 if tree[0] == "-" and tree[2] == _INFINITY and values.exact(tree[1]) == 0 else 0


def equal(one: RealSet, other: RealSet) -> bool:
    """Returns whether both are the same set and, if both name a symbol, whether they name the same one."""
    if one.name and other.name and one.name != other.name:
        return False
    ends = [[bound for interval in each.intervals for bound in interval] for each in (one, other)]
    return len(ends[0]) == len(ends[1]) and all(map(_same_end, *ends))


def _same_end(one: Bound, other: Bound) -> bool:
    if infinite(one.tree) or infinite(other.tree):
        return infinite(one.tree) == infinite(other.tree)
    return one.closed == other.closed and values.equal(one.tree, other.tree)


def read(answer: Answer) -> RealSet | None:
    """Returns the set that an answer describes, or None if it describes none."""
    if answer == REALS:
        return RealSet((Interval(_LEAST, _MOST),))
    if answer == EMPTY or answer == Opaque("emptyset"):
        return RealSet(())
    if isinstance(answer, Sequence):
        return _sequence(answer)
    if isinstance(answer, Union):
        return _joined(answer)
    if isinstance(answer, Relation):
        return _relation(answer)
    return None


def _bound(tree: Tree, closed: bool) -> Bound | None:
    sign = infinite(tree)
    if sign:
        return _MOST if sign > 0 else _LEAST
    place = values.approximate(tree)
    return None if place is None or place != place.real else Bound(place.real, tree, closed)


def _constant(answer: Answer, closed: bool = True) -> Bound | None:
    if not isinstance(answer, Scalar) or len(answer.trees) != 1 or answer.percent or symbols(answer.trees[0]):
        return None
    return _bound(answer.trees[0], closed)


def _points(items: tuple) -> RealSet | None:
    bounds = []
    for item in items:
        singles = [Scalar((tree,)) for tree in item.trees] if isinstance(item, Scalar) else [item]
        bounds += [_constant(single) for single in singles]
    if not all(bounds):
        return None
    return _union([RealSet((Interval(bound, bound),)) for bound in bounds])


def _sequence(answer: Sequence) -> RealSet | None:
    if answer.opening == "{":
        return _points(answer.items)
    if answer.opening in ("(", "[") and len(answer.items) == 2:
        low, high = (
            _constant(item, bracket in "[]")
            for item, bracket in zip(answer.items, (answer.opening, answer.closing), strict=True)
        )
        if low is None or high is None or not low.place < high.place:
            return None
        return RealSet((Interval(low, high),))
    if answer.opening:
        return None
    parts = [read(item) for item in answer.items if isinstance(item, Relation)]
    if not all(parts) or len(parts) != len(answer.items) or len({part.name for part in parts}) != 1:
        return None
    common = _intersection(parts)
    if answer.joint == "or" or (answer.joint == "," and not common.intervals):
        return _union(parts)
    return common


def _joined(answer: Union) -> RealSet | None:
    parts = [read(item) for item in answer.sets]
    if not all(part is not None for part in parts):
        return None
    if answer.sign == "cup":
        return _union(parts)
    if answer.sign == "cap":
        return _intersection(parts)
    return _intersection([parts[0], *map(_complement, parts[1:])])


def _relation(answer: Relation) -> RealSet | None:
    sides, signs = answer.sides, answer.signs
    if signs in (("in",), ("notin",)):
        found = read(sides[1])
        name = _name(sides[0])
        if signs == ("notin",) and found is not None:
            found = _complement(found)
        return None if found is None or name is None else RealSet(found.intervals, name)
    if not set(signs) <= _FLIPPED.keys():
        return None
    if signs == ("!=",) and isinstance(sides[1], Scalar) and len(sides[1].trees) == 2:  # x != +-1
        parts = [_half(sides[0], "!=", sides[1]._replace(trees=(tree,))) for tree in sides[1].trees]
        return _intersection(parts) if all(parts) else None
    if len(sides) == 2:
        if _constant(sides[0]) and not _constant(sides[1]):
            sides, signs = sides[::-1], (_FLIPPED[signs[0]],)
        return _half(sides[0], signs[0], sides[1])
    if len(sides) == 3 and _name(sides[1]) is not None and {*signs} & {"!=", "="} == set():
        left = _half(sides[1], _FLIPPED[signs[0]], sides[0])
        right = _half(sides[1], signs[1], sides[2])
        if left and right and signs[0][0] == signs[1][0]:
            return _intersection([left, right])
    return None


def _name(answer: Answer) -> str | None:
    if isinstance(answer, Scalar) and len(answer.trees) == 1 and answer.trees[0][0] == "symbol":
        return answer.trees[0][1]
    return None


def _half(side: Answer, sign: str, bound: Answer) -> RealSet | None:
    """Returns the set of x with `x sign bound`, or with `|x - c| sign bound`."""
    end = _constant(bound, sign in ("<=", ">=", "=", "!="))
    if end is None:
        return None
    name = _name(side)
    if name is not None:
        return RealSet(_solutions(sign, end), name)
    if not isinstance(side, Scalar) or side.trees[0][:2] != ("function", "abs"):
        return None
    inner = side.trees[0][2]
    centre: Tree = _ZERO
    if inner[0] in ("+", "-") and inner[1][0] == "symbol" and not symbols(inner[2]):
        centre = inner[2] if inner[0] == "-" else ("-", _ZERO, inner[2])
        inner = inner[1]
    if inner[0] != "symbol" or infinite(end.tree) or not end.place > 0:
        return None
    low, high = (_bound((sign_, centre, end.tree), end.closed) for sign_ in "-+")
    inside = RealSet((Interval(low, high),), inner[1])
    if sign in ("<", "<="):
        return inside
    if sign in (">", ">="):
        return _complement(RealSet((Interval(_turned(low), _turned(high)),), inner[1]))
    return None


def _solutions(sign: str, end: Bound) -> tuple[Interval, ...]:
    if sign in ("<", "<="):
        return (Interval(_LEAST, end),)
    if sign in (">", ">="):
        return (Interval(end, _MOST),)
    point = RealSet((Interval(end, end),))
    return point.intervals if sign == "=" else _complement(point).intervals


def _turned(bound: Bound) -> Bound:
    return bound._replace(closed=not bound.closed and bool(mp.isfinite(bound.place)))


def _union(parts: list[RealSet]) -> RealSet:
    return _combine(parts, any)


def _intersection(parts: list[RealSet]) -> RealSet:
    return _combine(parts, all)


def _complement(one: RealSet) -> RealSet:
    return _combine([one], lambda inside: not any(inside))


def _combine(parts: list[RealSet], rule: Callable[[list[bool]], bool]) -> RealSet:
    """Returns the points x for which `rule` holds of [x in part for each part].

    The rule is evaluated at every end and between neighbouring ends.
    """
    ends: dict[Any, Tree] = {}
    for part in parts:
        for interval in part.intervals:
            for bound in interval:
                if mp.isfinite(bound.place):
                    ends.setdefault(bound.place, bound.tree)
    places = sorted(ends)
    pieces: list[tuple[bool, Bound, Bound]] = []  # whether inside, from, to
    edges = [-mp.inf, *places, mp.inf]
    for left, right in zip(edges, edges[1:], strict=False):
        middle = (left + right) / 2 if mp.isfinite(left) and mp.isfinite(right) else _beyond(left, right)
        inside = rule([_contains(part, middle) for part in parts])
        low = Bound(left, ends[left], False) if mp.isfinite(left) else _LEAST
        high = Bound(right, ends[right], False) if mp.isfinite(right) else _MOST
        pieces.append((inside, low, high))
        if mp.isfinite(right):
            point = Bound(right, ends[right], True)
            pieces.append((rule([_contains(part, right) for part in parts]), point, point))
    found: list[Interval] = []
    joined = False
    for inside, low, high in pieces:
        if inside and joined:
            found[-1] = Interval(found[-1].low, high)
        elif inside:
            found.append(Interval(low, high))
        joined = inside
    names = {part.name for part in parts} - {""}
    return RealSet(tuple(found), names.pop() if len(names) == 1 else "")


def _beyond(left: Any, right: Any) -> Any:
    if mp.isfinite(left):
        return left + 1
    return right - 1 if mp.isfinite(right) else mp.mpf(0)


def _contains(part: RealSet, place: Any) -> bool:
    return any(
        (low.place < place or (low.closed and low.place == place))
        and (place < high.place or (high.closed and high.place == place))
        for low, high in part.intervals
    )
