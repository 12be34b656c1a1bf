"""Tells which answers are names, as on the left of `x = 5`, and which symbols an answer contains."""

from typing import Any

from gdsd_jax.tasks.graders import values
from gdsd_jax.tasks.graders.kinds import Answer, Opaque, Scalar, Sequence
from gdsd_jax.tasks.graders.trees import Tree, symbols


def is_call(answer: Answer) -> bool:
    return isinstance(answer, Scalar) and answer.trees[0][0] == "unknown"


def is_name(answer: Answer) -> bool:
    """Returns whether the answer is a name: x, x_1, f(x), AB, "Area", (x, y)."""
    if isinstance(answer, Opaque):
        return answer.words
    if isinstance(answer, Sequence):
        return answer.opening == "(" and all(isinstance(item, Scalar) and is_name(item) for item in answer.items)
    if not isinstance(answer, Scalar) or len(answer.trees) != 1 or answer.percent:
        return False
    return answer.trees[0][0] in ("symbol", "unknown") or _is_word(answer.trees[0])


def _is_word(tree: Tree) -> bool:
    """Returns whether the tree consists of capital letters side by side, as in names of segments in geometry."""
    if tree[0] == "symbol":
        return len(tree[1]) == 1 and tree[1].isupper()
    return tree[0] == "*" and _is_word(tree[1]) and _is_word(tree[2])


def same_name(one: Answer, other: Answer) -> bool:
    """Returns whether two names are equal, or are y and f(x)."""
    if "y" in (label(one), label(other)) and (_is_function(one) or _is_function(other)):
        return True
    if isinstance(one, Scalar) and isinstance(other, Scalar):
        return values.equal(one.trees[0], other.trees[0])
    return one == other


def _is_function(name: Answer) -> bool:
    return is_call(name) and name.trees[0][1].isalpha() and name.trees[0][2][0] == "symbol"


def symbols_in(answer: Any) -> set[str]:
    """Returns the names of all symbols in an answer."""
    if isinstance(answer, Scalar):
        return set().union(*map(symbols, answer.trees))
    parts = answer if isinstance(answer, tuple) else ()
    return set().union(*(symbols_in(part) for part in parts if isinstance(part, tuple)))


def label(name: Answer) -> str | None:
    return name.trees[0][1] if isinstance(name, Scalar) and name.trees[0][0] == "symbol" else None
