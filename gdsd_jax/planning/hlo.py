"""Reads an optimised HLO module: its instructions, its computations, and the scalars that bound its loops."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

DTYPE_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64,
    "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
_ARRAY = re.compile(r"([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LONGEST_LOOP = 1_000_000


class Array(NamedTuple):
    """One array of a shape; `fast` if it lies in on-chip memory (a memory space other than HBM)."""

    dtype: str
    dims: tuple[int, ...]
    fast: bool

    @property
    def bytes(self) -> float:
        """Returns the bytes of the array without the padding of tiles."""
        return math.prod(self.dims) * DTYPE_BITS.get(self.dtype, 8) / 8


class Instruction(NamedTuple):
    """One instruction; `literal` is the text inside its parentheses, `attributes` the text after them."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str

    def attribute(self, name: str) -> str | None:
        """Returns the value of an attribute (the name of a computation, or a number), or None if it is absent."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found and found[1]


class Computation(NamedTuple):
    instructions: dict[str, Instruction]
    root: Instruction

    def users(self, name: str) -> list[Instruction]:
        return [other for other in self.instructions.values() if name in other.operands]

    def parameter(self, number: int) -> Instruction:
        return next(i for i in self.instructions.values() if i.opcode == "parameter" and i.literal == str(number))


class Module(NamedTuple):
    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Parses the text of a module, as `compiled.as_text()` returns it."""
    computations: dict[str, Computation] = {}
    entry, name, body, root = "", "", {}, None
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            name, body, root = header[2], {}, None
            entry = name if header[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(body, root)
        elif name:
            found = _INSTRUCTION.match(line)
            if found:
                instruction = _instruction(found[2], found[3])
                body[instruction.name] = instruction
                root = instruction if found[1] else root
    return Module(computations, entry)


def _instruction(name: str, text: str) -> Instruction:
    """Parses `SHAPE opcode(operands), attributes`, where a tuple's shape is in parentheses."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, rest[:opening], _arrays(shape), operands, inside, rest[closing + 1 :])


def _closing(text: str, opening: int) -> int:
    """Returns the position of the parenthesis that closes the one at `opening`."""
    depth = 0
    for position in range(opening, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if depth == 0:
            return position
    raise ValueError(f"unbalanced parentheses in HLO: {text[:80]}")


def _arrays(shape: str) -> tuple[Array, ...]:
    found = []
    for dtype, dims, layout in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape)):
        sizes = tuple(int(size.strip("<=")) for size in dims.split(",") if size)
        found.append(Array(dtype, sizes, bool(re.search(r"S\([1-9]", layout))))
    return tuple(found)


# ----------------------------------------------------------------------------------------------------- loops' lengths

# A value that depends on data.
UNKNOWN = object()
_SCALAR: dict[str, Callable] = {
    "add": lambda a, b: a + b, "subtract": lambda a, b: a - b, "multiply": lambda a, b: a * b,
    "maximum": max, "minimum": min, "and": lambda a, b: a & b, "or": lambda a, b: a | b, "not": lambda a: not a,
    "select": lambda p, a, b: a if p else b, "copy": lambda a: a, "bitcast": lambda a: a, "reshape": lambda a: a,
    "convert": int, "copy-start": lambda a: a, "copy-done": lambda a: a,
}  # fmt: skip
_COMPARE = {
    "LT": lambda a, b: a < b, "LE": lambda a, b: a <= b, "GT": lambda a, b: a > b, "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b, "NE": lambda a, b: a != b,
}  # fmt: skip


class Scope:
    """Evaluates the integer scalars of one computation that follow from its text and its parameters.

    Args:
      parameters: a function from `(number, index)` to the value of a parameter: of the parameter itself if the index is
        None, otherwise of that element of the tuple.
    """

    def __init__(self, module: Module, name: str, parameters: Callable[[int, int | None], Any]):
        self.module, self.body, self.parameters = module, module.computations[name], parameters
        self._known: dict[tuple[str, int | None], Any] = {}

    def value(self, name: str, index: int | None = None) -> Any:
        """Returns the scalar `name`, or the scalar at `index` of the tuple `name`; UNKNOWN if it depends on data."""
        if (name, index) not in self._known:
            self._known[name, index] = self._value(self.body.instructions[name], index)
        return self._known[name, index]

    def _value(self, instruction: Instruction, index: int | None) -> Any:
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "parameter":
            return self.parameters(int(instruction.literal), index)
        if opcode == "get-tuple-element":
            return self.value(operands[0], int(instruction.attribute("index"))) if index is None else UNKNOWN
        if opcode == "tuple":
            return UNKNOWN if index is None else self.value(operands[index])
        if opcode == "constant":
            return _literal(instruction.literal)
        if opcode in ("fusion", "call"):
            called = instruction.attribute("calls") or instruction.attribute("to_apply")
            inner = Scope(self.module, called, lambda number, index: self.value(operands[number], index))
            return inner.value(inner.body.root.name, index)
        if opcode == "while" and index is not None:
            # An element of the state that the loop passes on unchanged.
            body = self.module.computations[instruction.attribute("body")]
            return self.value(operands[0], index) if _hands_on(body, index) else UNKNOWN
        if opcode not in _SCALAR and opcode != "compare":
            return UNKNOWN
        values = [self.value(operand) for operand in operands]
        if any(value is UNKNOWN for value in values):
            return UNKNOWN
        if opcode == "compare":
            return _COMPARE[instruction.attribute("direction")](*values)
        return _SCALAR[opcode](*values)


def _literal(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    return int(text) if re.fullmatch(r"-?\d+", text) else UNKNOWN


def _hands_on(body: Computation, index: int) -> bool:
    """Returns whether a loop's body passes element `index` of its state on unchanged."""
    if body.root.opcode != "tuple":
        return False
    source = body.instructions[body.root.operands[index]]
    return (
        source.opcode == "get-tuple-element"
        and int(source.attribute("index")) == index
        and body.instructions[source.operands[0]].opcode == "parameter"
    )


def loop(scope: Scope, instruction: Instruction) -> tuple[int | None, Mapping[int, Any]]:
    """Returns how often a `while` runs (None if unknown), and by index the elements of its state that never change."""
    body_name, start = instruction.attribute("body"), instruction.operands[0]
    body = scope.module.computations[body_name]
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.attributes)
    size = len(body.root.operands)
    fixed = {index: scope.value(start, index) for index in range(size) if _hands_on(body, index)}
    if known:
        return int(known[1]), fixed
    state = {index: scope.value(start, index) for index in range(size)}
    for count in range(_LONGEST_LOOP):
        current = lambda number, index, state=state: state.get(index, UNKNOWN)  # noqa: E731
        test = Scope(scope.module, instruction.attribute("condition"), current)
        proceed = test.value(test.body.root.name)
        if proceed is UNKNOWN:
            return None, fixed
        if not proceed:
            return count, fixed
        step = Scope(scope.module, body_name, current)
        state = {i: v if v is UNKNOWN or i in fixed else step.value(body.root.name, i) for i, v in state.items()}
    return None, fixed
