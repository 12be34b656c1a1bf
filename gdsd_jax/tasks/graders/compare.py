r"""Compares an answer with the right one by type: numbers, lists, tuples, sets, relations, matrices, words.

The two sides have different roles. The right answer (`gold`) says what is asked for. An answer may leave out the unit,
the `x =` and the brackets, but may not add a claim of its own.
"""

from collections.abc import Callable
from typing import Any

from gdsd_jax.tasks.graders import scalars, sets, values
from gdsd_jax.tasks.graders.answers import (
    EMPTY,
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
    opaque,
    read,
    strip,
)
from gdsd_jax.tasks.graders.tokens import Unreadable, tokenize
from gdsd_jax.tasks.graders.trees import Tree, symbols

_MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}


def equal(gold: str, answer: str) -> bool:
    """Returns whether the answer says the same as the gold. No text makes this function raise."""
    for loose in (True, False):
        try:
            wanted, found = read(gold, loose), read(answer, loose)
            if same(wanted, found) or _same_words(wanted, answer):
                return True
        except (Unreadable, RecursionError):
            continue
    return False


def _same_words(gold: Answer, answer: str) -> bool:
    """Returns whether the answer is the words of the gold; words such as Tom may be read as products of letters."""
    return isinstance(gold, Opaque) and gold.words and opaque(strip(tokenize(answer))).text.lower() == gold.text.lower()


def same(gold: Answer, answer: Answer) -> bool:
    """Returns whether two typed answers are the same; see `equal`."""
    if isinstance(gold, Relation) or isinstance(answer, Relation):
        return _with_relation(gold, answer)
    if isinstance(gold, Scalar) and isinstance(answer, Scalar) and len(gold.trees) == len(answer.trees) == 1:
        return scalars.same(gold, answer)
    if isinstance(gold, Ratio) or isinstance(answer, Ratio):
        return _same_ratio(gold, answer)
    kinds = (type(gold), type(answer))
    if kinds == (Based, Based):
        return gold == answer
    if kinds == (Opaque, Opaque):
        return gold.text == answer.text or sets_equal(gold, answer)
    if kinds == (Residue, Residue):
        return same(gold.value, answer.value) and same(gold.modulus, answer.modulus)
    if kinds == (Matrix, Matrix):
        return list(map(len, gold.rows)) == list(map(len, answer.rows)) and all(
            same(one, other)
            for row, other_row in zip(gold.rows, answer.rows, strict=True)
            for one, other in zip(row, other_row, strict=True)
        )
    gold, answer = _members(gold), _members(answer)
    if isinstance(gold, Sequence) and isinstance(answer, Sequence):
        return _same_sequence(gold, answer) or (gold.opening != answer.opening and sets_equal(gold, answer))
    if isinstance(gold, Sequence) != isinstance(answer, Sequence):
        one, other = (gold, answer) if isinstance(gold, Sequence) else (answer, gold)
        if one.opening == "{" and len(one.items) == 1 and isinstance(other, Scalar):
            return same(one.items[0], other) if one is gold else same(other, one.items[0])
    return sets_equal(gold, answer)


def sets_equal(gold: Answer, answer: Answer) -> bool:
    """Returns whether both describe the same set of real numbers."""
    one, other = sets.read(gold), sets.read(answer)
    if one is not None and other is not None:
        return sets.equal(one, other)
    if isinstance(gold, Union) and isinstance(answer, Union) and gold.sign == answer.sign:
        return _matched(gold.sets, answer.sets, same)
    return False


def _members(answer: Answer) -> Answer:
    """Returns the answer with plus-minus signs written out: as a list of two, or as two members of a list or set."""
    if isinstance(answer, Scalar) and len(answer.trees) == 2:
        return Sequence(tuple(answer._replace(trees=(tree,)) for tree in answer.trees))
    if isinstance(answer, Sequence) and answer.opening in ("", "{"):
        items = []
        for item in answer.items:
            opened = _members(item) if isinstance(item, Scalar) else item
            items += opened.items if isinstance(item, Scalar) and isinstance(opened, Sequence) else [item]
        return answer._replace(items=tuple(items))
    return answer


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


def _same_ratio(gold: Answer, answer: Answer) -> bool:
    if isinstance(gold, Ratio) and isinstance(answer, Ratio):
        halves = gold.half == answer.half or not (gold.half and answer.half)
        return halves and len(gold.parts) == len(answer.parts) and all(map(same, gold.parts, answer.parts))
    ratio, scalar = (gold, answer) if isinstance(gold, Ratio) else (answer, gold)
    if not all(isinstance(part, Scalar) and len(part.trees) == 1 for part in (scalar, *ratio.parts)):
        return False
    if scalar.percent or scalar.unit or len(ratio.parts) != 2 or _is_time(ratio):
        return False
    quotient = ("/", ratio.parts[0].trees[0], ratio.parts[1].trees[0])
    return scalar.trees[0][0] == "/" and values.equal(quotient, scalar.trees[0])


def _is_time(ratio: Ratio) -> bool:
    hour, minute = ratio.texts
    return bool(ratio.half) or (hour.isdigit() and minute.isdigit() and len(minute) == 2 and int(minute) < 60)


# ----------------------------------------------------------------------------------------------------------------------
# Lists, tuples, sets


def _matched(gold: tuple, answer: tuple, rule: Callable[[Answer, Answer], bool]) -> bool:
    """Returns whether each member of one can be paired with a member of the other, in any order."""
    if len(gold) != len(answer) or len(gold) > 64:
        return False
    rest = list(answer)
    for wanted in gold:
        index = next((index for index, found in enumerate(rest) if rule(wanted, found)), None)
        if index is None:
            return False
        rest.pop(index)
    return True


def _same_sequence(gold: Sequence, answer: Sequence) -> bool:
    if gold == EMPTY or answer == EMPTY:
        return gold == answer
    if len(gold.items) != len(answer.items):
        return False
    named = [_assignments(each) for each in (gold, answer)]
    if named[0] is None and named[1] is not None:
        items, distinct = named[1]
        answer = Sequence(items, "(", ")") if distinct else answer._replace(items=items)
        if distinct:
            return gold.opening in ("(", "") and all(map(same, gold.items, items))
    elif named[0] is not None and named[1] is None:
        items, distinct = named[0]
        if any(isinstance(item, Relation) for item in answer.items):
            return False
        gold = Sequence(items, "(", ")") if distinct else Sequence(items)
    ordered = all(map(same, gold.items, answer.items))
    pair, other = (gold.opening, gold.closing), (answer.opening, answer.closing)
    if gold.opening in ("", "{") and answer.opening in ("", "{"):
        return ordered or _matched(gold.items, answer.items, same)
    if pair == ("", ""):
        return ordered and (other == ("(", ")") or (other == ("[", "]") and len(gold.items) > 2))
    if pair == ("(", ")") and other == ("", ""):
        return ordered
    return pair == other and ordered


def _assignments(answer: Sequence) -> tuple[tuple, bool] | None:
    """Returns the values of `x = 3, y = 4` in the order of the names, and whether the names differ.

    The result is None for any other list.

    In `x = 2, 3` and in `x_1 = 2, x_2 = 3` all values belong to one name.
    """
    if answer.opening or not answer.items or not isinstance(answer.items[0], Relation):
        return None
    pairs = [_named_value(item) if isinstance(item, Relation) else (None, item) for item in answer.items]
    if any(pair is None for pair in pairs):
        return None
    names = [_label(name) for name, _ in pairs if name is not None]
    found = tuple(value for _, value in pairs)
    if len(names) != len(pairs):
        return (found, False) if len(names) == 1 else None
    if None in names or len({name.partition("_")[0] for name in names}) == 1:
        return found, False
    if len(set(names)) != len(names):
        return None
    latin = all(len(name) == 1 for name in names)
    order = sorted(range(len(names)), key=lambda index: names[index]) if latin else range(len(names))
    return tuple(found[index] for index in order), True


def _label(name: Answer) -> str | None:
    return name.trees[0][1] if isinstance(name, Scalar) and name.trees[0][0] == "symbol" else None


# ----------------------------------------------------------------------------------------------------------------------
# Relations


def _with_relation(gold: Answer, answer: Answer) -> bool:
    one, other = sets.read(gold), sets.read(answer)
    if one is not None and not _is_equation(gold) and not _is_equation(answer):
        # If the gold is in solved form, the answer must be in solved form too.
        return other is not None and sets.equal(one, other)
    if isinstance(gold, Relation) and isinstance(answer, Relation):
        return _same_relation(gold, answer)
    if isinstance(gold, Relation):
        pair = _named_value(gold)
        if pair is None or (not _is_call(pair[0]) and _symbols(pair[1])):
            return False
        return same(pair[1], answer)
    value = _unwrapped(answer)
    return value is not None and same(gold, value)


def _is_equation(answer: Answer) -> bool:
    return isinstance(answer, Relation) and set(answer.signs) == {"="}


def _same_relation(gold: Relation, answer: Relation) -> bool:
    solved = _named_value(gold), _named_value(answer)
    if all(solved) and _same_name(solved[0][0], solved[1][0]):
        return gold.signs[-1] == answer.signs[-1] and same(solved[0][1], solved[1][1])
    if solved[0] and not _symbols(solved[0][1]):
        return False
    if len(gold.sides) != len(answer.sides):
        return False
    if not all(isinstance(side, Scalar) and len(side.trees) == 1 for side in (*gold.sides, *answer.sides)):
        return False
    if len(gold.sides) > 2:
        mirrored = tuple(_MIRRORED.get(sign, sign) for sign in reversed(answer.signs))
        return (gold.signs == answer.signs and all(map(same, gold.sides, answer.sides))) or (
            gold.signs == mirrored and all(map(same, gold.sides, answer.sides[::-1]))
        )
    (tree, sign), (other, other_sign) = _difference(gold), _difference(answer)
    if sign != other_sign or not symbols(tree) or symbols(tree) != symbols(other):
        return False
    factor = values.proportional(tree, other)
    return factor is not None and (sign in ("=", "!=") or (factor == factor.real and factor.real > 0))


def _difference(relation: Relation) -> tuple[Tree, str]:
    """Returns (left - right, sign) with < turned to >."""
    left, right = (side.trees[0] for side in relation.sides)
    if relation.signs[0] in ("<", "<="):
        return ("-", right, left), _MIRRORED[relation.signs[0]]
    return ("-", left, right), relation.signs[0]


def _named_value(relation: Relation) -> tuple[Answer, Answer] | None:
    """Returns (name, value) of `x = value`, `value = x`, `f(x) = expression` and `x in S`.

    There may be steps in between: `A = bh/2 = 12`.
    """
    sides = relation.sides
    if relation.signs == ("in",):
        return sides if _is_name(sides[0]) else None
    if set(relation.signs) != {"="}:
        return None
    if len(sides) == 2 and _is_name(sides[1]) and not _is_name(sides[0]):
        sides = sides[::-1]
    name, value = sides[0], sides[-1]
    if not _is_name(name) or (not _is_call(name) and _symbols(name) & _symbols(value)):
        return None
    for step in sides[1:-1]:
        if _symbols(step) & _symbols(name) or (not _symbols(step) and not _symbols(value) and not same(value, step)):
            return None
    return name, value


def _unwrapped(relation: Relation) -> Answer | None:
    """Returns the value that an equation gives to a name, or the value of both sides if they are equal numbers."""
    pair = _named_value(relation)
    if pair is not None:
        return pair[1]
    numbers = all(isinstance(side, Scalar) and not _symbols(side) for side in relation.sides)
    if numbers and _is_equation(relation) and all(same(relation.sides[-1], side) for side in relation.sides[:-1]):
        return relation.sides[-1]
    return None


def _is_call(answer: Answer) -> bool:
    return isinstance(answer, Scalar) and answer.trees[0][0] == "unknown"


def _is_name(answer: Answer) -> bool:
    """Returns whether the answer is a name: x, x_1, f(x), AB, "Area", (x, y)."""
    if isinstance(answer, Opaque):
        return answer.words
    if isinstance(answer, Sequence):
        return answer.opening == "(" and all(isinstance(item, Scalar) and _is_name(item) for item in answer.items)
    if not isinstance(answer, Scalar) or len(answer.trees) != 1 or answer.percent:
        return False
    return answer.trees[0][0] in ("symbol", "unknown") or _is_word(answer.trees[0])


def _is_word(tree: Tree) -> bool:
    """Returns whether the tree consists of capital letters side by side, as in names of segments in geometry."""
    if tree[0] == "symbol":
        return len(tree[1]) == 1 and tree[1].isupper()
    return tree[0] == "*" and _is_word(tree[1]) and _is_word(tree[2])


def _same_name(one: Answer, other: Answer) -> bool:
    if isinstance(one, Scalar) and isinstance(other, Scalar):
        return values.equal(one.trees[0], other.trees[0])
    return one == other


def _symbols(answer: Any) -> set[str]:
    """Returns the names of all symbols in an answer."""
    if isinstance(answer, Scalar):
        return set().union(*map(symbols, answer.trees))
    parts = answer if isinstance(answer, tuple) else ()
    return set().union(*(_symbols(part) for part in parts if isinstance(part, tuple)))
