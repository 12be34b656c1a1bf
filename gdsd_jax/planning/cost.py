"""Counts the FLOPs, HBM bytes and collectives of a compiled program on one chip, with every run of its loops."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from gdsd_jax.planning import hlo
from gdsd_jax.planning.hlo import Array, Computation, Instruction, Module, Scope

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
# Matrix products that one kernel call computes from its [.., T, K] queries and [.., S, K] keys: 2 T S K FLOPs each.
KERNELS = {"splash_mha_fwd": 2, "splash_mha_dkv": 5}
# Opcodes that move nothing.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id", "iota",
    "opt-barrier", "add-dependency",
}  # fmt: skip
_SLICING = ("dynamic-slice", "slice", "gather")
_SCOPES = ("while", "body", "cond", "closed_call", "checkpoint", "rematted_computation")


@dataclasses.dataclass
class Cost:
    """The cost of a program, or of a part of it, on one chip.

    Attributes:
      flops: FLOPs of matrix products and convolutions, 2 per multiply-add; known kernels are counted by their shapes.
      hbm: bytes read from and written to HBM.
      kernels: calls of each kernel by its name.
      sent: bytes that the chip sends, by kind of collective, over rings: a gather of n shards sends n - 1 shards.
      calls: how often each kind of collective runs.
      hbm_by, sent_by: bytes of HBM and of the network, by the label of the instruction that moves them (`_label`).
      open_loops: the number of loops whose length depends on data, so that the caller's length was assumed.
    """

    flops: float = 0.0
    hbm: float = 0.0
    kernels: Counter = dataclasses.field(default_factory=Counter)
    sent: Counter = dataclasses.field(default_factory=Counter)
    calls: Counter = dataclasses.field(default_factory=Counter)
    hbm_by: Counter = dataclasses.field(default_factory=Counter)
    sent_by: Counter = dataclasses.field(default_factory=Counter)
    open_loops: int = 0

    def add(self, other: Cost, times: int = 1) -> None:
        self.flops += times * other.flops
        self.hbm += times * other.hbm
        self.open_loops += other.open_loops
        for counter in ("kernels", "sent", "calls", "hbm_by", "sent_by"):
            mine = getattr(self, counter)
            for name, value in getattr(other, counter).items():
                mine[name] += times * value


def program_cost(text: str, *, open_loops: Sequence[int] = (1,)) -> Cost:
    """Computes the cost of a program from its optimised HLO.

    Args:
      open_loops: the assumed lengths of loops whose lengths depend on data: of the outermost ones, of those inside
        them, and so on; the last is also that of all deeper ones.
    """
    module = hlo.parse(text)
    unknown = lambda number, index: hlo.UNKNOWN  # noqa: E731
    return _Walk(module, tuple(open_loops)).computation(Scope(module, module.entry, unknown))


class _Walk:
    def __init__(self, module: Module, open_loops: tuple[int, ...]):
        self.module, self.open_loops = module, open_loops

    def computation(self, scope: Scope, channels: set[str] | None = None) -> Cost:
        """Returns the cost of one execution of a computation.

        Args:
          channels: the channels of collectives already counted in this execution. The TPU compiler clones an
            asynchronous collective into every computation in which it starts, continues or ends; all clones share one
            channel.
        """
        total, channels = Cost(), set() if channels is None else channels
        for instruction in scope.body.instructions.values():
            total.add(self.instruction(scope, instruction, channels))
        return total

    def instruction(self, scope: Scope, instruction: Instruction, channels: set[str]) -> Cost:
        opcode = instruction.opcode
        if opcode == "while":
            return self.loop(scope, instruction)
        if opcode == "conditional":
            branches = re.findall(r"%([\w.\-]+)", instruction.attributes.split("branch_computations")[-1].split("}")[0])
            unknown = lambda number, index: hlo.UNKNOWN  # noqa: E731
            costs = [self.computation(Scope(self.module, name, unknown)) for name in branches]
            return max(costs, key=lambda cost: (cost.flops, cost.hbm))
        if opcode in ("call", "async-start"):
            called = instruction.attribute("to_apply") or instruction.attribute("calls")
            inner = Scope(self.module, called, lambda n, i: scope.value(instruction.operands[n], i))
            return self.computation(inner, channels)
        cost = Cost(hbm=_hbm_bytes(self.module, scope.body, instruction))
        if cost.hbm:
            cost.hbm_by[_label(instruction)] += cost.hbm
        self.products(scope.body, instruction, cost, channels)
        return cost

    def loop(self, scope: Scope, instruction: Instruction) -> Cost:
        count, fixed = hlo.loop(scope, instruction)
        total, outer = Cost(open_loops=count is None), self.open_loops
        if count is None:
            count, self.open_loops = outer[0], outer[1:] or outer
        known = lambda number, index: fixed.get(index, hlo.UNKNOWN)  # noqa: E731
        for name in ("condition", "body"):
            inner = Scope(self.module, instruction.attribute(name), known)
            total.add(self.computation(inner), count)
        self.open_loops = outer
        return total

    def products(self, body: Computation, instruction: Instruction, cost: Cost, channels: set[str]) -> None:
        """Adds the FLOPs and collectives of an instruction, and of the instructions fused into it, to `cost`."""
        opcode = instruction.opcode
        if opcode == "fusion":
            fused = self.module.computations[instruction.attribute("calls")]
            for inner in fused.instructions.values():
                self.products(fused, inner, cost, channels)
        elif opcode == "dot":
            cost.flops += dot_flops(body, instruction)
        elif opcode == "convolution":
            cost.flops += convolution_flops(body, instruction)
        elif opcode == "custom-call":
            name = kernel_name(instruction)
            if name is not None:
                cost.kernels[name] += 1
                cost.flops += kernel_flops(body, instruction, name)
        else:
            kind = opcode.removesuffix("-start")
            channel = instruction.attribute("channel_id")
            if kind in COLLECTIVES and channel not in channels:
                channels |= {channel} - {None}
                sent = sent_bytes(body, instruction, kind)
                cost.calls[kind] += 1
                cost.sent[kind] += sent
                cost.sent_by[_label(instruction)] += sent


def _label(instruction: Instruction) -> str:
    """Returns an instruction's opcode and the program's operation that it belongs to or, if unknown, its own name."""
    source = re.search(r'op_name="([^"]*)"', instruction.attributes)
    # Scopes of loops and transformations are dropped: they do not distinguish instructions.
    parts = [part for part in source[1].split("/")[1:] if part not in _SCOPES] if source else [instruction.name]
    return f"{instruction.opcode.removesuffix('-start').removesuffix('-done')} {'/'.join(parts)}"


# ---------------------------------------------------------------------------------------------------------------- FLOPs


def _shape(body: Computation, instruction: Instruction, operand: int) -> tuple[int, ...]:
    return body.instructions[instruction.operands[operand]].arrays[0].dims


def _sizes(attributes: str, name: str) -> tuple[int, ...]:
    found = re.search(rf"\b{name}=\{{([\d,]*)\}}", attributes)
    return tuple(int(size) for size in found[1].split(",") if size) if found else ()


def dot_flops(body: Computation, instruction: Instruction) -> float:
    """Computes 2 x (elements of the result) x (length of the contraction)."""
    left = _shape(body, instruction, 0)
    contracted = math.prod(left[axis] for axis in _sizes(instruction.attributes, "lhs_contracting_dims"))
    return 2 * math.prod(instruction.arrays[0].dims) * contracted


def convolution_flops(body: Computation, instruction: Instruction) -> float:
    """Computes 2 x (multiply-adds whose input is data, not padding).

    The TPU compiler writes dots as convolutions and batch dimensions as padded windows.
    """
    left, right, result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    inputs, kernel, outputs = _shape(body, instruction, 0), _shape(body, instruction, 1), instruction.arrays[0].dims
    total = 2 * outputs[result.index("b")] * outputs[result.index("f")] * kernel[right.index("i")]
    for axis in (label for label in left if label.isdigit()):
        window = _window(instruction.attributes, int(axis))
        total *= _touching(inputs[left.index(axis)], outputs[result.index(axis)], **window)
    return total


def _window(attributes: str, axis: int) -> dict[str, int]:
    """Returns the size, stride, low padding and dilations of a convolution's window along one spatial axis."""
    text = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=") for part in text[1].split()) if text else {}
    number = lambda name, default: int(fields[name].split("x")[axis]) if name in fields else default  # noqa: E731
    low = int(fields["pad"].split("x")[axis].split("_")[0]) if "pad" in fields else 0
    return {
        "size": number("size", 1), "stride": number("stride", 1), "low": low,
        "input_dilation": number("lhs_dilate", 1), "kernel_dilation": number("rhs_dilate", 1),
    }  # fmt: skip


def _touching(
    inputs: int, outputs: int, *, size: int, stride: int, low: int, input_dilation: int, kernel_dilation: int
) -> int:
    """Counts pairs of an output and a kernel position whose input is data, not padding or a gap of the dilation."""
    place = np.arange(outputs)[:, None] * stride + np.arange(size) * kernel_dilation - low
    return int(np.sum((place >= 0) & (place <= (inputs - 1) * input_dilation) & (place % input_dilation == 0)))


def kernel_name(instruction: Instruction) -> str | None:
    """Returns the name of a Pallas kernel, or None for the compiler's own helpers, which compute nothing."""
    if 'custom_call_target="tpu_custom_call"' not in instruction.attributes:
        return None
    return re.sub(r"[.\d]+$", "", instruction.name)


def kernel_flops(body: Computation, instruction: Instruction, name: str) -> float:
    """Computes the FLOPs of a splash attention kernel over whole sequences, padding included.

    Raises:
      ValueError: the kernel is not in `KERNELS`.
    """
    products = next((count for known, count in KERNELS.items() if name.startswith(known)), None)
    if products is None:
        raise ValueError(f"kernel {name!r} is not known: say in gdsd_jax.planning.cost.KERNELS what it computes")
    arrays = [body.instructions[operand].arrays[0] for operand in instruction.operands]
    query, key = [array.dims for array in arrays if array.dtype in ("bf16", "f32")][:2]
    return products * 2 * math.prod(query) * key[-2]


# ------------------------------------------------------------------------------------------------------------- network


def sent_bytes(body: Computation, instruction: Instruction, kind: str) -> float:
    """Computes the bytes that each chip sends in a collective over a ring or, for all-to-all, in a direct exchange."""
    if kind == "collective-permute":
        return body.instructions[instruction.operands[0]].arrays[0].bytes
    size = group_size(instruction.attributes)
    operands = sum(sum(a.bytes for a in body.instructions[name].arrays) for name in instruction.operands)
    share = (size - 1) / size
    return operands * {"all-gather": size - 1, "all-reduce": 2 * share}.get(kind, share)


def group_size(attributes: str) -> int:
    """Returns the number of chips in one group of a collective, for every notation of `replica_groups` in HLO.

    Raises:
      ValueError: the notation is not known, so that the bytes would be counted wrongly.
    """
    # A mesh may name its devices in another order: mesh['a'=8,'b'=2], device_ids=([2,8]T(1,0)) {'a'}.
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\S+\))? \{([\w',]*)\}", attributes)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=", attributes)
    if iota:
        return int(iota[1].split(",")[-1])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return len(listed[1].split(","))
    if "replica_groups=" in attributes:
        raise ValueError(f"unknown notation of a collective's groups: {attributes[:200]}")
    return 1


# ----------------------------------------------------------------------------------------------------------------- HBM


def _hbm_bytes(module: Module, body: Computation, instruction: Instruction) -> float:
    """Computes the bytes that an instruction moves between HBM and the chip; arrays in on-chip memory cost nothing."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-start") or "AllocateBuffer" in instruction.attributes:
        return 0.0
    source = instruction
    if opcode.endswith("-done"):
        # A pair of start and done counts once, at its done.
        source = body.instructions[instruction.operands[0]]
        if source.opcode == "async-start":
            return 0.0
    fused = module.computations[instruction.attribute("calls")] if opcode == "fusion" else None
    written = sum(array.bytes for array in instruction.arrays if not array.fast)
    if fused:
        written = _written(fused, instruction.arrays)
    elif opcode == "dynamic-update-slice":
        return 2 * sum(a.bytes for a in body.instructions[instruction.operands[1]].arrays if not a.fast)
    read = 0.0
    for number, name in enumerate(source.operands):
        arrays = [a for a in body.instructions[name].arrays if not a.fast]
        size = sum(array.bytes for array in arrays)
        if fused and size:
            size = min(size, _read(module, fused, number))
        elif source.opcode in (*_SLICING, "slice-start", "dynamic-slice-start"):
            size = min(size, sum(array.bytes for array in instruction.arrays))
        read += size
    return read + written


def _read(module: Module, fused: Computation, number: int) -> float:
    """Computes the bytes that a fusion reads from one operand: only the slices, if it uses nothing but slices."""
    parameter = fused.parameter(number)
    whole, total = sum(array.bytes for array in parameter.arrays), 0.0
    for user in fused.users(parameter.name):
        if user.opcode in _SLICING:
            total += sum(array.bytes for array in user.arrays)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
            continue
        elif user.opcode == "fusion":
            inner = module.computations[user.attribute("calls")]
            total += sum(_read(module, inner, n) for n, name in enumerate(user.operands) if name == parameter.name)
        elif user.opcode == "bitcast" and all(u.opcode in _SLICING for u in fused.users(user.name)):
            total += sum(array.bytes for u in fused.users(user.name) for array in u.arrays)
        else:
            return whole
    return min(total, whole)


def _written(fused: Computation, arrays: tuple[Array, ...]) -> float:
    """Computes the bytes that a fusion writes; if its root updates a slice in place, only the slice counts."""
    tupled = fused.root.opcode == "tuple"
    roots = [fused.instructions[name] for name in fused.root.operands] if tupled else [fused.root] * len(arrays)
    total = 0.0
    for root, array in zip(roots, arrays, strict=True):
        while root.opcode == "bitcast":
            root = fused.instructions[root.operands[0]]
        if array.fast:
            continue
        update = root.opcode == "dynamic-update-slice"
        total += fused.instructions[root.operands[1]].arrays[0].bytes if update else array.bytes
    return total
