"""Translates between tensor names of a Hugging Face checkpoint and places in our parameters, by the family's table.

A stored tensor of a layer is one layer of a parameter, whose first axis is the layers: a matrix is `[out, in]` on disk,
as PyTorch's `Linear` has it, and `[N, out, in]` in our parameters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from gdsd_jax.denoiser import TARGETS, DenoiserConfig
from gdsd_jax.families import family_of
from gdsd_jax.hub.patterns import matching


class Slot(NamedTuple):
    """The place of one stored tensor: its path in the base, its layer (None if not stacked), and its stored shape."""

    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]

    @property
    def is_matrix(self) -> bool:
        """Tells whether this is a matrix of a layer, which may have an adapter, and may be held in 8 bits."""
        return self.path[-1] == "weight"


def slots(config: DenoiserConfig) -> dict[str, Slot]:
    """Returns the slot of every tensor that a checkpoint of this configuration has, by stored name; no slot has two."""
    sizes = {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "Q": config.num_heads * config.head_dim,
        "K": config.num_kv_heads * config.head_dim,
        "H": config.head_dim,
    }
    table = {}
    for row in family_of(config).rows:
        if row.path == ("head",) and config.tied_head or row.path[-1] == "bias" and not config.qkv_bias:
            continue
        if row.path[-1] in ("q_norm", "k_norm") and not config.qk_norm:
            continue
        shape = tuple(sizes[axis] for axis in row.axes)
        for layer in range(config.num_layers) if row.path[0] == "layers" else (None,):
            table[row.name.format(n=layer)] = Slot(row.path, layer, shape)
    return table


def parameters(config: DenoiserConfig) -> dict[tuple[str, ...], list[str]]:
    """Returns the stored names of each path in the base, in the order of the layers: `slots` in the other direction."""
    names: dict[tuple[str, ...], list[str]] = {}
    for name, slot in slots(config).items():
        names.setdefault(slot.path, []).append(name)
    return names


def at(tree: Any, path: Sequence[str]) -> Any:
    """Returns the leaf of a nested dictionary at `path`."""
    for key in path:
        tree = tree[key]
    return tree


def put(tree: dict, path: Sequence[str], value: Any) -> None:
    """Sets the leaf at `path`, making the dictionaries on the way."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def module(config: DenoiserConfig, target: str, layer: int | str = "{n}") -> str:
    """Returns the name of the PyTorch module that holds the matrix of an adapter target (our name) in a layer."""
    path = ("layers", target, "weight")
    return next(row.name for row in family_of(config).rows if row.path == path).removesuffix(".weight").format(n=layer)


def target_modules(config: DenoiserConfig, targets: Sequence[str]) -> list[str] | str:
    """Returns PEFT's `target_modules` for adapter targets in our names, in their order.

    The value is a list with the last part of each module name, which PEFT matches as a suffix. If such a part also ends
    the name of a module that is no target (one family's head is named like its down projection), the value is instead
    one regular expression over whole names that matches only inside the blocks.
    """
    wanted = [module(config, target) for target in targets]
    leaves = [name.rpartition(".")[2] for name in wanted]
    others = {row.name.removesuffix(".weight") for row in family_of(config).rows} - set(wanted)
    if not any(other.rpartition(".")[2] in leaves for other in others):
        return leaves
    prefix = wanted[0].partition("{n}.")[0]
    inner = "|".join(re.escape(name.partition("{n}.")[2]) for name in wanted)
    return rf"{re.escape(prefix)}\d+\.(?:{inner})"


def matched_targets(
    config: DenoiserConfig, spec: Sequence[str] | str, where: str = "target_modules"
) -> tuple[str, ...]:
    """Returns our names of the block matrices that PEFT's `target_modules` selects, in the order that it gives.

    Raises:
      UserError: a string that is no regular expression, or one that takes too long.
    """
    modules = {target: module(config, target, 0) for target in TARGETS}
    if spec == "all-linear":
        return TARGETS
    if isinstance(spec, str):
        found = matching(spec, list(modules.values()), where)
        chosen = [target for target, name in modules.items() if name in found]
        order = spec
    else:
        chosen = [t for t, name in modules.items() if any(name == s or name.endswith(f".{s}") for s in spec)]
        order = "|".join(spec)
    return tuple(sorted(chosen, key=lambda target: order.find(modules[target].rpartition(".")[2])))


def adapter_names(config: DenoiserConfig, targets: Sequence[str]) -> dict[str, tuple[str, str, int]]:
    """Maps the name of each PEFT tensor to (target, "a" or "b", layer).

    PEFT stores A as `[r, in]` and B as `[out, r]`; ours are their transposes.
    """
    return {
        f"base_model.model.{module(config, target, layer)}.lora_{factor.upper()}.weight": (target, factor, layer)
        for target in targets
        for layer in range(config.num_layers)
        for factor in ("a", "b")
    }


def hf_config(config: DenoiserConfig) -> dict[str, Any]:
    """Returns a complete `config.json` in the keys of the family, for parameters that come from no checkpoint.

    `auto_map` points at the family's modelling code on the hub.
    """
    return family_of(config).write(config)
