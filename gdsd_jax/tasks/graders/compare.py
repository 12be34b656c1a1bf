r"""Compares an answer with the right one by type: numbers, lists, tuples, sets, relations, matrices, words.

The two sides have different roles. The right answer (`gold`) says what is asked for. An answer may leave out the unit,
the `x =` and the brackets, but may not add a claim of its own.
"""

import re
from collections.abc import Callable

from gdsd_jax.tasks.graders import ratios, scalars, sets, values, words
from gdsd_jax.tasks.graders.answers import opaque, read, strip
from gdsd_jax.tasks.graders.kinds import (
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
)
from gdsd_jax.tasks.graders.names import is_call, is_name, label, same_name, symbols_in
from gdsd_jax.tasks.graders.tokens import Unreadable, tokenize
from gdsd_jax.tasks.graders.trees import Tree, symbols

# A comma that separates thousands, because no member of a list starts with 0.
_THOUSANDS = re.compile(r"[0-9],0[0-9]")
# One number, or a list; if it is a list, then in this order.
_GROUPED = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+")
# A pair of numbers whose comma does not separate thousands.
_PAIR = re.compile(r"\A\W*\(\s*[0-9]{1,3},\s*[0-9]{3}\s*(?:\\right)?\)\W*\Z")
_CHOICE = re.compile(r"\s*(?:\\(?:text|textbf|mathrm|mathbf)\s?\{\s*)?\(?([A-Z])\)?[\s}]*\Z")
_CHOSEN = re.compile(
    r"\s*(?:\\(?:text|textbf|mathrm|mathbf|rm|bf)\s?\{?\s*){0,2}\(([A-Z])\)(?![\s}]*[-+=!,*/^])(?!.*(?:\([A-Z]\)|\bor\b|\band\b|\bnot\b))",
    re.DOTALL,
)
_MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}


def equal(gold: str, answer: str) -> bool:
    """Returns whether the answer says the same as the gold. No text makes this function raise."""
    for loose in (True, False):
        if (_PAIR if loose else _THOUSANDS).search(gold):
            continue
        try:
            wanted, found = read(gold, loose), read(answer, loose)
            if not loose and isinstance(wanted, Sequence) and _GROUPED.fullmatch(gold):
                wanted = wanted._replace(opening="(", closing=")")
            if same(wanted, found) or _same_words(wanted, answer):
                return True
        except (Unreadable, RecursionError):
            continue
    return _same_choice(gold, answer) or _same_number(gold, answer)


def _same_choice(gold: str, answer: str) -> bool:
    """Returns whether the answer names the gold's choice, with its text after it, and no other choice: (C) 5."""
    wanted, found = _CHOICE.match(gold), _CHOSEN.match(answer)
    return bool(wanted and found and wanted[1] == found[1])


def _same_number(gold: str, answer: str) -> bool:
    """Returns whether the answer is the gold in words, such as twelve."""
    digits = words.number(answer)
    return digits is not None and re.fullmatch(r"[-0-9.,/\s]{1,40}", gold) is not None and equal(gold, digits)


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
        return ratios.same(gold, answer, same)
    kinds = (type(gold), type(answer))
    if kinds == (Based, Based):
        return gold == answer
    if kinds == (Opaque, Opaque):
        return gold.text == answer.text or sets_equal(gold, answer)
    if kinds == (Residue, Residue):
        return same(gold.value, answer.value) and same(gold.modulus, answer.modulus)
    if set(kinds) == {Residue, Scalar}:
        return ratios.same_remainder(gold, answer)
    if kinds == (Matrix, Matrix):
        return list(map(len, gold.rows)) == list(map(len, answer.rows)) and all(
            same(one, other)
            for row, other_row in zip(gold.rows, answer.rows, strict=True)
            for one, other in zip(row, other_row, strict=True)
        )
    gold, answer = _members(gold), _members(answer)
    if isinstance(gold, Sequence) and isinstance(answer, Sequence):
        if {gold.joint, answer.joint} == {"and", "or"} and any(map(_is_inequality, gold.items)):
            return sets_equal(gold, answer)
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
    """Returns the values of `x = 3, y = 4` in the order of the names, and whether the names differ; else None.

    In `x = 2, 3` and in `x_1 = 2, x_2 = 3` all values belong to one name.
    """
    if answer.opening or not answer.items or not isinstance(answer.items[0], Relation):
        return None
    pairs = [_named_value(item) if isinstance(item, Relation) else (None, item) for item in answer.items]
    if any(pair is None for pair in pairs):
        return None
    names = [label(name) for name, _ in pairs if name is not None]
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


# ----------------------------------------------------------------------------------------------------------------------
# Relations


def _readings(relation: Relation) -> tuple[Answer, ...]:
    """Returns what a relation with an approximation says: both the exact value and, if it is one, its rounding.

    `x = 12\\sqrt{3} \\approx 20.78` says `x = 12\\sqrt{3}` and `x = 20.78`; it says nothing if the rounding is wrong.
    """
    *before, last = relation.sides
    exact = before[-1]
    numbers = all(isinstance(side, Scalar) and len(side.trees) == 1 and not symbols_in(side) for side in (exact, last))
    if not numbers or set(relation.signs[:-1]) - {"="}:
        return (relation._replace(signs=tuple("=" if sign == "approx" else sign for sign in relation.signs)),)
    if not scalars.rounds(exact, last):
        return ()
    if len(before) == 1:
        return exact, last
    return Relation(tuple(before), relation.signs[:-1]), Relation((before[0], last), ("=",))


def _with_relation(gold: Answer, answer: Answer) -> bool:
    if isinstance(answer, Relation) and "approx" in answer.signs:
        return any(same(gold, reading) for reading in _readings(answer))
    if isinstance(gold, Relation) and "approx" in gold.signs:
        gold = gold._replace(signs=tuple("=" if sign == "approx" else sign for sign in gold.signs))
    one, other = sets.read(gold), sets.read(answer)
    if one is not None and not _is_equation(gold) and not _is_equation(answer):
        # If the gold is in solved form, the answer must be in solved form too.
        return other is not None and sets.equal(one, other)
    if isinstance(gold, Relation) and isinstance(answer, Relation):
        return _same_relation(gold, answer)
    if isinstance(gold, Relation):
        pair = _named_value(gold)
        if pair is None or (symbols_in(pair[1]) and not _is_function(*pair)):
            return False
        return same(pair[1], answer)
    value = _unwrapped(answer)
    return value is not None and same(gold, value)


def _is_function(name: Answer, value: Answer) -> bool:
    """Returns whether a name is f(x), or a_n with a value in n."""
    return is_call(name) or (label(name) or "").partition("_")[2] in symbols_in(value)


def _is_equation(answer: Answer) -> bool:
    return isinstance(answer, Relation) and set(answer.signs) == {"="}


def _is_inequality(answer: Answer) -> bool:
    return isinstance(answer, Relation) and not _is_equation(answer)


def _same_relation(gold: Relation, answer: Relation) -> bool:
    solved = _named_value(gold), _named_value(answer)
    if all(solved) and same_name(solved[0][0], solved[1][0]):
        return gold.signs[-1] == answer.signs[-1] and same(solved[0][1], solved[1][1])
    if solved[0] and not symbols_in(solved[0][1]):
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
        return sides if is_name(sides[0]) else None
    if set(relation.signs) - {"=", "approx"}:
        return None
    if len(sides) == 2 and is_name(sides[1]) and not is_name(sides[0]):
        sides = sides[::-1]
    name, value = sides[0], sides[-1]
    if not is_name(name) or (not is_call(name) and symbols_in(name) & symbols_in(value)):
        return None
    for step in sides[1:-1]:
        if symbols_in(step) & symbols_in(name) or (
            not symbols_in(step) and not symbols_in(value) and not same(value, step)
        ):
            return None
    return name, value


def _unwrapped(relation: Relation) -> Answer | None:
    """Returns the value that an equation gives to a name, or the value of both sides if they are equal numbers."""
    pair = _named_value(relation)
    if pair is not None:
        return pair[1]
    numbers = all(isinstance(side, Scalar) and not symbols_in(side) for side in relation.sides)
    if numbers and _is_equation(relation) and all(same(relation.sides[-1], side) for side in relation.sides[:-1]):
        return relation.sides[-1]
    return None
