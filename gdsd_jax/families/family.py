"""Defines `Family`, the contract between a model family's file and all other code, and readers that families share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gdsd_jax.denoiser import TARGETS, DenoiserConfig
from gdsd_jax.runtime.errors import UserError, did_you_mean

# The places of all parameters, and of those that only some families have.
_ALWAYS = {"embedding", "final_norm", "layers/attn_norm", "layers/mlp_norm", *(f"layers/{x}/weight" for x in TARGETS)}
_SOMETIMES = {"head", "layers/q_norm", "layers/k_norm", *(f"layers/{x}/bias" for x in "qkv")}


class Row(NamedTuple):
    """One row of a name table: stored name (`{n}` is the layer), path in the base, and symbols of the stored axes.

    Axes: V vocabulary, D model, F feed-forward, Q all query heads, K all key/value heads, H size of one head.
    """

    name: str
    path: tuple[str, ...]
    axes: str


@dataclasses.dataclass(frozen=True)
class Family:
    """A checkpoint format and its peculiarities. Each file of this folder exports its families as `FAMILIES`.

    Attributes:
      name: value of `DenoiserConfig.family`.
      model_type: value of `model_type` in `config.json`.
      repository: the hub repository that carries the modelling code, for `auto_map`.
      rows: the name table; no stored name and no place in the base occurs twice.
      read: `config.json` -> `DenoiserConfig`. A KeyError becomes an error that names the absent key.
      write: `DenoiserConfig` -> a complete `config.json`.
      quirks: fields of `DenoiserConfig` that are the same in every checkpoint of the family.
      tokens: texts of special tokens, by the key of `config.json` that would hold their id, for ids that only the
        tokenizer knows.
      tokenizer_classes: tokenizer classes that exist only as Python files beside a checkpoint -> the class of
        transformers that computes the same from the same files.
      task_type: the `task_type` of PEFT adapters; None if PEFT's wrapper of causal language models does not fit.
      sampler: fields of `SamplerConfig` that the authors use by default.
      published: sizes of published checkpoints by the name of their directory.
      autoregressive: `model_type` of causal language models with the same tensors, from which a run can start.
    """

    name: str
    model_type: str
    repository: str
    rows: tuple[Row, ...]
    read: Callable[[Mapping[str, Any]], DenoiserConfig]
    write: Callable[[DenoiserConfig], dict[str, Any]]
    quirks: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tokenizer_classes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    task_type: str | None = "CAUSAL_LM"
    sampler: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    published: Mapping[str, DenoiserConfig] = dataclasses.field(default_factory=dict)
    autoregressive: str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError unless the name table has all parameters of a denoiser, and nothing else."""
        places = {"/".join(row.path) for row in self.rows}
        for place in sorted(places - _ALWAYS - _SOMETIMES):
            raise ValueError(
                f"family {self.name!r}: no parameter of the denoiser is called {place}"
                + did_you_mean(place, _ALWAYS | _SOMETIMES)
            )
        if _ALWAYS - places:
            raise ValueError(f"family {self.name!r}: the name table lacks {', '.join(sorted(_ALWAYS - places))}")


def refuse(hf: Mapping[str, Any], supported: Mapping[str, tuple]) -> None:
    """Raises UserError if an option is set to a value that changes the mathematics and is not implemented here."""
    for key, allowed in supported.items():
        if key in hf and hf[key] not in allowed:
            raise UserError(
                f"config.json sets {key} to {hf[key]!r}; this denoiser computes only {allowed[0]!r}: "
                "use a checkpoint with that value"
            )


def rope_theta(hf: Mapping[str, Any]) -> float:
    """Reads the base of the rotary embedding from `rope_theta`, or from `rope_parameters` (transformers 5).

    Raises:
      UserError: two bases disagree, or positions are scaled, which is not implemented here.
      KeyError: no base is given.
    """
    found = {} if hf.get("rope_theta") is None else {"rope_theta": hf["rope_theta"]}
    for key in ("rope_parameters", "rope_scaling"):
        entry = hf.get(key) or {}
        if not isinstance(entry, Mapping):
            raise UserError(f"config.json sets {key} to {entry!r}: an object is needed")
        # If a model has several kinds of layers, transformers 5 nests the parameters by kind.
        nested = bool(entry) and all(isinstance(value, Mapping) for value in entry.values())
        for kind, parameters in entry.items() if nested else [("", entry)]:
            kinds = {parameters.get("rope_type", "default"), parameters.get("type", "default")} - {None}
            extra = set(parameters) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
            if kinds - {"default"} or extra or parameters.get("partial_rotary_factor", 1) != 1:
                raise UserError(
                    f"config.json sets {key} to {dict(parameters)!r}; this denoiser computes only 'default' positions: "
                    "use a checkpoint without scaled positions"
                )
            if parameters.get("rope_theta") is not None:
                found[".".join(filter(None, (key, kind, "rope_theta")))] = parameters["rope_theta"]
    if not found:
        raise KeyError("rope_theta")
    if len({float(value) for value in found.values()}) > 1:
        raise UserError(f"config.json holds bases that disagree, {found}: remove the wrong one")
    return float(next(iter(found.values())))
