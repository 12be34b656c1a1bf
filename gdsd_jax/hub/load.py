"""Reads checkpoints and adapters in Hugging Face's layout, tensor by tensor, and refuses whatever does not fit.

Over a mesh, each host reads only what its own devices hold, and reads every byte once even if several devices share it.
The layers of a parameter are stacked on the devices, one at a time, so that host memory holds one stored tensor.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from gdsd_jax.denoiser import DenoiserConfig, LoRA, logical_axes
from gdsd_jax.denoiser.lora import target_shapes
from gdsd_jax.denoiser.quantise import quantise_layers
from gdsd_jax.hub import names
from gdsd_jax.hub.declared import read_config
from gdsd_jax.hub.files import (
    FLOATS,
    Reader,
    Stored,
    checked_directory,
    checkpoint_tensors,
    read_header,
    read_json,
    read_metadata,
    weight_files,
)
from gdsd_jax.hub.finite import require_finite
from gdsd_jax.hub.incoming import THREADS, Loader
from gdsd_jax.hub.redundant import without_redundant
from gdsd_jax.runtime import ranges
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.files import understood
from gdsd_jax.runtime.sharding import automatic

# Key in the header of an exported adapter: the fingerprint of the base that it was trained on.
BASE_FINGERPRINT = "base_fingerprint"
_SAMPLES, _SAMPLE_BYTES = 16, 4096

# PEFT options, with the values under which an adapter is plainly W + (alpha / r) (A B)^T on whole layers.
_PLAIN_LORA = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_rslora": (False,),
    "use_dora": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layers_to_transform": (None,),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None, []),
}
# Initialisations of PEFT that change the base weights, so that the adapter does not fit the original base.
_CHANGES_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
_REMEDIES = {
    "alora_invocation_tokens": "it acts after these tokens alone: train a plain adapter",
    "use_rslora": "scale lora_alpha by sqrt(r) and switch it off",
}


def _match(tensors: dict[str, Stored], wanted: dict[str, tuple[int, ...]], where: os.PathLike, advice: str) -> None:
    """Raises UserError unless `tensors` are exactly the wanted ones, with the wanted shapes, in a float dtype."""
    for kind, odd in (("lacks", set(wanted) - set(tensors)), ("holds the unknown", set(tensors) - set(wanted))):
        if odd:
            more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
            raise UserError(f"{where} {kind} tensor {min(odd)}{more}: {advice}")
    for name, shape in wanted.items():
        stored = tensors[name]
        if stored.shape != shape:
            raise UserError(f"tensor {name} in {stored.file} has shape {stored.shape}, not {shape}: {advice}")
        if stored.dtype not in FLOATS:
            raise UserError(f"tensor {name} in {stored.file} is stored as {stored.dtype}: use float weights")


def float_dtype(dtype: Any) -> np.dtype | None:
    """Returns the NumPy dtype that `dtype` names, or None for None; raises UserError if it is no float type."""
    try:
        found = None if dtype is None else jnp.dtype(dtype)
    except TypeError:
        found = jnp.dtype(bool)
    if found is not None and not jnp.issubdtype(found, jnp.floating):
        raise UserError(f"dtype {dtype!r} is no float type: give one such as 'bfloat16' or 'float32'")
    return found


def load_checkpoint(
    directory: str | os.PathLike,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    reader: Reader | None = None,
    overrides: Mapping[str, Any] | None = None,
    weights: str = "stored",
) -> tuple[DenoiserConfig, dict]:
    """Reads a checkpoint directory: `config.json` and one safetensors file, or shards with their index.

    All names, shapes and byte ranges are checked before the first tensor is read. Over a mesh, host memory peaks at the
    local part of one stored tensor; without a mesh, at one parameter with all of its layers.

    Args:
      directory: a checkpoint in Hugging Face's layout, on a disk or in a bucket (`gs://`).
      dtype: dtype of the parameters; None keeps the stored ones.
      mesh: every parameter is sharded over it by the rules of `gdsd_jax.runtime.sharding`, and each process reads only
        what its own devices hold. Its axes become Auto axes. None puts the parameters on the default device.
      reader: counts the bytes that are read; None makes a new one.
      overrides: as for `read_config`.
      weights: "int8" rounds the matrices of the layers on the devices, parameter by parameter, see
        `gdsd_jax.denoiser.quantise`; the devices never hold more than one of them in two dtypes.

    Returns:
      The configuration and the base: a nested dictionary of arrays, the matrices of the layers `[N, out, in]`.

    Raises:
      UserError: a dtype that is no float type; an absent, truncated or corrupt file; an index that disagrees with its
        shards; an unknown model; a missing, unknown, repeated, misshapen or non-float tensor.
    """
    directory, reader, dtype = checked_directory(directory), reader or Reader(), float_dtype(dtype)
    config = read_config(directory, overrides)
    tensors = without_redundant(checkpoint_tensors(directory, reader), config, reader)
    if config.num_layers > len(tensors):
        raise UserError(
            f"{directory}: config.json declares {config.num_layers} layers, but its files hold {len(tensors)} tensors: "
            "it does not fit them"
        )
    slots, axes = names.slots(config), None if mesh is None else logical_axes(config)
    _match(tensors, {name: slot.shape for name, slot in slots.items()}, directory, "it does not fit its config.json")
    base: dict = {}
    mesh = None if mesh is None else automatic(mesh)
    with ThreadPoolExecutor(THREADS) as pool:
        loader = Loader(dtype, reader, pool)
        for path, stored_names in names.parameters(config).items():
            layers, slot = [tensors[name] for name in stored_names], slots[stored_names[0]]
            if mesh is None:
                parameter = loader.whole(layers, slot)
            else:
                parameter = loader.spread(layers, slot, names.at(axes, path), mesh)
            if weights == "int8" and slot.is_matrix:
                parameter, scale = quantise_layers(parameter)
                # The parameter must be gone before the next one is read.
                jax.block_until_ready(parameter)
                names.put(base, (*path[:-1], "scale"), scale)
            names.put(base, path, parameter)
    return dataclasses.replace(config, weights=weights), base


def load_adapter(directory: str | os.PathLike, config: DenoiserConfig) -> LoRA:
    """Reads a PEFT directory (`adapter_config.json`, `adapter_model.safetensors`) into float32 adapter weights.

    Raises:
      UserError: a file is absent or corrupt; the adapter is no plain LoRA; it targets none of our modules; or its
        tensors are not exactly A and B of every targeted module of this model.
    """
    directory = checked_directory(directory)
    file = directory / "adapter_config.json"
    peft = read_json(file)
    with understood(file, "export the adapter again"):
        return _read_adapter(directory, file, peft, config)


def _read_adapter(directory: epath.Path, file: epath.Path, peft: Mapping[str, Any], config: DenoiserConfig) -> LoRA:
    for key, plain in _PLAIN_LORA.items():
        if peft.get(key, plain[0]) not in plain:
            remedy = f": {_REMEDIES[key]}" if key in _REMEDIES else ""
            raise UserError(
                f"{file} sets {key} to {peft[key]!r}; only plain LoRA ({key} = {plain[0]!r}) is supported{remedy}"
            )
    start = str(peft.get("init_lora_weights")).lower()
    if start.startswith(_CHANGES_THE_BASE):
        raise UserError(
            f"{file} sets init_lora_weights to {start!r}, which changes the base: save the adapter again with PEFT's "
            "path_initial_model_for_weight_conversion, or merge it in PEFT and load the merged checkpoint"
        )
    missing = [key for key in ("r", "lora_alpha", "target_modules") if key not in peft]
    if missing:
        raise UserError(f"{file} lacks the key {missing[0]!r}: export the adapter again")
    targets = names.matched_targets(config, peft["target_modules"], f"{file}: target_modules")
    if not targets:
        raise UserError(f"{file}: target_modules {peft['target_modules']!r} names no module of this model")
    rank = ranges.convert(ranges.Count, peft["r"], f"{file}: r")
    alpha = ranges.convert(ranges.Positive, peft["lora_alpha"], f"{file}: lora_alpha")
    dropout = ranges.convert(ranges.Share, peft.get("lora_dropout", 0.0), f"{file}: lora_dropout")
    places = names.adapter_names(config, targets)
    shapes = {}
    for name, (target, factor, _) in places.items():
        fan_in, fan_out = target_shapes(config)[target]
        shapes[name] = (rank, fan_in) if factor == "a" else (fan_out, rank)
    path = directory / "adapter_model.safetensors"
    reader = Reader()
    tensors = read_header(path, reader)
    _match(tensors, shapes, path, "it does not fit adapter_config.json and this model")
    weights: dict = {target: {} for target in targets}
    for target in targets:
        for factor in ("a", "b"):
            stored = [tensors[name] for name, place in places.items() if place[:2] == (target, factor)]
            layers = [reader.tensor(layer) for layer in stored]
            for layer, tensor in zip(stored, layers, strict=True):
                require_finite(tensor, layer.name, path)
            weights[target][factor] = jnp.stack([tensor.T.astype(np.float32) for tensor in layers])
    return LoRA(
        {"layers": weights},
        rank=rank,
        alpha=alpha,
        targets=targets,
        dropout=dropout,
    )


def fingerprint(directory: str | os.PathLike) -> str:
    """Computes a short identity of a checkpoint, 16 hexadecimal digits, without reading all of it.

    The digits are a hash of the values in `config.json`, of each weight file's name, size and header, and of 16 evenly
    spaced pages of its data, since checkpoints of one architecture share their headers. Copying or touching the files
    does not change the hash.

    Raises:
      UserError: as for `load_checkpoint`, as far as files and headers go.
    """
    directory, reader = checked_directory(directory), Reader()
    digest = hashlib.sha256(json.dumps(read_json(directory / "config.json"), sort_keys=True).encode())
    for path in weight_files(directory)[0]:
        read_header(path, reader)
        size = path.stat().length
        digest.update(f"{path.name} {size}".encode())
        start = 8 + int.from_bytes(reader.read(path, 0, 8), "little")
        digest.update(reader.read(path, 0, start))
        for sample in range(_SAMPLES):
            begin = start + max(0, size - start - _SAMPLE_BYTES) * sample // (_SAMPLES - 1)
            digest.update(reader.read(path, begin, min(_SAMPLE_BYTES, size - begin)))
    return digest.hexdigest()[:16]


def another_base(adapter: str | os.PathLike, checkpoint: str | os.PathLike) -> tuple[str, bool] | None:
    """Compares the base that an adapter records with a checkpoint.

    Returns:
      None if the adapter records this checkpoint or no base. Otherwise a sentence that says what differs, and whether
      the difference is certain: it is if the fingerprints differ, and is not if only the names do.
    """
    directory = checked_directory(adapter)
    recorded = read_metadata(directory / "adapter_model.safetensors").get(BASE_FINGERPRINT)
    if recorded is not None:
        if recorded == fingerprint(checkpoint):
            return None
        return f"{adapter} was trained on a base with fingerprint {str(recorded)[:16]}, not on {checkpoint}", True
    name = read_json(directory / "adapter_config.json").get("base_model_name_or_path")
    last = os.path.basename(str(name or "").rstrip("/"))
    if not last or last in (os.path.basename(path(checkpoint)) for path in (os.path.abspath, os.path.realpath)):
        return None
    return f"{adapter} names {str(name)[:200]!r} as its base, not {checkpoint}", False
