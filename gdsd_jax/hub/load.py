"""Reads checkpoints and adapters in Hugging Face's layout, tensor by tensor, and refuses whatever does not fit.

The safetensors format (huggingface.co/docs/safetensors): eight bytes with the length of a JSON header, the header,
which gives every tensor's dtype, shape and byte range, then the bytes. It is read here directly, so that only the rows
that are asked for leave the disk and bfloat16 needs no detour.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gdsd_jax.denoiser import DenoiserConfig, LoRA
from gdsd_jax.denoiser.lora import target_shapes
from gdsd_jax.errors import UserError
from gdsd_jax.hub import names

FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_OTHER_SIZES = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_OTHER_SIZES |= {"F8_E4M3": 1, "F8_E5M2": 1}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_SAMPLES, _SAMPLE_BYTES = 16, 4096

# PEFT options under which an adapter is something else than W + (alpha / r) A B on whole layers.
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
}


class Stored(NamedTuple):
    """A tensor in a safetensors file; `begin` counts bytes from the start of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    size: int


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      UserError: it is absent, does not parse, or holds something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: the directory is no complete checkpoint") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: download it again")
    return content


def checked_directory(directory: str | os.PathLike) -> Path:
    """The directory as a path.

    Raises:
      UserError: it does not exist or is no directory.
    """
    path = Path(directory)
    if not path.is_dir():
        raise UserError(f"{path} is not a directory: give the path of a checkpoint in Hugging Face's layout")
    return path


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"holds {twice} twice")
    return result


def read_header(path: Path) -> dict[str, Stored]:
    """What a safetensors file holds, with every byte of the file accounted for.

    Raises:
      UserError: the file is absent, truncated or corrupt, or holds a tensor twice.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: the directory is no complete checkpoint")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) == 8 and length > _MAX_HEADER_BYTES:
            raise UserError(f"{path} is no safetensors file (its header would be {length} bytes): download it again")
        raw = file.read(length)
    if len(head) < 8 or len(raw) < length:
        raise UserError(f"{path} is truncated within its header ({size} bytes): download it again")
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        tensors = {
            name: (entry["dtype"], tuple(int(n) for n in entry["shape"]), *map(int, entry["data_offsets"]))
            for name, entry in header.items()
        }
        ranges = sorted((begin, end, name) for name, (_, _, begin, end) in tensors.items())
    except UserError as error:
        raise UserError(f"{path} {error}: download it again") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} has a corrupt header ({type(error).__name__}: {error}): download it again") from None
    data, position = size - 8 - length, 0
    for begin, end, name in ranges:
        dtype, shape, *_ = tensors[name]
        item = FLOATS[dtype].itemsize if dtype in FLOATS else _OTHER_SIZES.get(dtype)
        if item is None:
            raise UserError(f"{path} stores {name} in the unknown dtype {dtype!r}")
        if begin != position or end - begin != item * int(np.prod(shape, dtype=np.int64)):
            raise UserError(f"{path} has a corrupt header (byte range of {name}): download it again")
        position = end
    if position > data:
        raise UserError(f"{path} is truncated: {data} of {position} bytes of tensors are there: download it again")
    if position < data:
        raise UserError(f"{path} has {data - position} bytes after its last tensor: download it again")
    return {
        name: Stored(path, dtype, shape, 8 + length + begin, end - begin)
        for name, (dtype, shape, begin, end) in tensors.items()
    }


def read_tensor(stored: Stored, rows: slice = slice(None)) -> np.ndarray:
    """A tensor, or some of its rows, in the stored dtype. Reads only those rows.

    Raises:
      UserError: the file has become shorter since its header was read.
    """
    dtype = FLOATS[stored.dtype]
    first, last, _ = rows.indices(stored.shape[0])
    row_bytes = stored.size // stored.shape[0]
    count = (last - first) * row_bytes
    data = np.fromfile(stored.file, np.uint8, count, offset=stored.begin + first * row_bytes)
    if data.size != count:
        raise UserError(f"{stored.file} is truncated: download it again")
    return data.view(dtype).reshape(last - first, *stored.shape[1:])


def weight_files(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a checkpoint, and the index's map from tensor to file name if it is sharded.

    Raises:
      UserError: there are none, both layouts at once, an absent shard, a shard that the index does not name.
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists() and index.exists():
        raise UserError(f"{directory} has both {single.name} and {index.name}: remove the one that is stale")
    if single.exists():
        return [single], None
    if not index.exists():
        raise UserError(f"{directory} has neither {single.name} nor {index.name}: only safetensors weights are read")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"{index} has no weight_map from tensor to file: download it again")
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if not (directory / shard).is_file()]
    if absent:
        raise UserError(f"{index} names the shard {absent[0]}, which is not there: download it")
    stray = sorted({path.name for path in directory.glob("model-*.safetensors")} - set(shards))
    if stray:
        raise UserError(f"{directory / stray[0]} is not named in {index.name}: remove it or download the index again")
    return [directory / shard for shard in shards], weight_map


def _checkpoint_tensors(directory: Path) -> dict[str, Stored]:
    files, weight_map = weight_files(directory)
    tensors: dict[str, Stored] = {}
    for file in files:
        for name, stored in read_header(file).items():
            if name in tensors:
                raise UserError(f"tensor {name} is in {tensors[name].file} and again in {file}: remove one of them")
            if weight_map is not None and weight_map.get(name) != file.name:
                claim = weight_map.get(name, "no shard")
                raise UserError(f"tensor {name} is in {file}, but the index puts it in {claim}: download both again")
            tensors[name] = stored
    lost = sorted(set(weight_map or ()) - set(tensors))
    if lost:
        raise UserError(f"tensor {lost[0]} is not in {directory / weight_map[lost[0]]}, where the index puts it")
    return tensors


def _match(tensors: dict[str, Stored], wanted: dict[str, tuple[int, ...]], where: Path, advice: str) -> None:
    """Raises unless `tensors` are exactly the wanted ones, with the wanted shapes, in a float dtype."""
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


def read_part(layers: list[Stored], slot: names.Slot, dtype: np.dtype, index: tuple[slice, ...]) -> np.ndarray:
    """The block at `index` of a parameter (its layers stacked, its kernels transposed), from no more rows than needed.

    Args:
      layers: the stored tensors of the parameter in the order of its layers, or the only one.
      slot: of any of them.
      index: one slice of step 1 per axis of the parameter.
    """
    stacked = slot.layer is not None
    chosen, inner = (layers[index[0]], index[1:]) if stacked else (layers, index)
    matrix = slot.shape[::-1] if slot.transposed else slot.shape
    extents = [len(range(*piece.indices(size))) for piece, size in zip(inner, matrix, strict=True)]
    rows, *columns = inner[::-1] if slot.transposed else inner
    out = np.empty((len(chosen), *extents), dtype)
    for layer, stored in zip(out, chosen, strict=True):
        block = read_tensor(stored, rows)[:, *columns]
        layer[...] = block.T if slot.transposed else block
    return out if stacked else out[0]


def _place(layers: list[Stored], slot: names.Slot, dtype: np.dtype | None, mesh: Mesh | None) -> jax.Array:
    """One parameter on its devices; with a mesh, each process reads what its own devices hold."""
    kinds = {stored.dtype for stored in layers}
    if dtype is None and len(kinds) > 1:
        raise UserError(f"{layers[0].file} stores the layers of {'/'.join(slot.path)} as {kinds}: give one dtype")
    dtype = dtype or FLOATS[layers[0].dtype]
    matrix = slot.shape[::-1] if slot.transposed else slot.shape
    shape = matrix if slot.layer is None else (len(layers), *matrix)
    if mesh is None:
        return jax.device_put(read_part(layers, slot, dtype, (slice(None),) * len(shape)))
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.make_array_from_callback(shape, sharding, lambda index: read_part(layers, slot, dtype, index))


def load_checkpoint(
    directory: str | os.PathLike, *, dtype: Any = None, mesh: Mesh | None = None
) -> tuple[DenoiserConfig, dict]:
    """Reads a checkpoint directory: `config.json` and one safetensors file, or shards with their index.

    Host memory peaks at one stacked parameter and one stored tensor; all names, shapes and byte ranges are checked
    before the first tensor is read.

    Args:
      directory: a checkpoint in Hugging Face's layout.
      dtype: dtype of the parameters; None keeps the stored ones.
      mesh: replicates the parameters over this mesh; None puts them on the default device.

    Returns:
      The configuration and the base: a nested dictionary of arrays, kernels `[N, in, out]`.

    Raises:
      UserError: an absent, truncated or corrupt file; an index that disagrees with its shards; an unknown model; a
        missing, unknown, repeated, misshapen or non-float tensor.
    """
    directory = checked_directory(directory)
    config = DenoiserConfig.from_hf(read_json(directory / "config.json"))
    tensors = _checkpoint_tensors(directory)
    slots = names.slots(config)
    _match(tensors, {name: slot.shape for name, slot in slots.items()}, directory, "it does not fit its config.json")
    dtype = None if dtype is None else jnp.dtype(dtype)
    base: dict = {}
    for path, stored_names in names.parameters(config).items():
        layers = [tensors[name] for name in stored_names]
        names.put(base, path, _place(layers, slots[stored_names[0]], dtype, mesh))
    return config, base


def load_adapter(directory: str | os.PathLike, config: DenoiserConfig) -> LoRA:
    """Reads a PEFT directory (`adapter_config.json`, `adapter_model.safetensors`) into float32 adapter weights.

    Raises:
      UserError: a file is absent or corrupt; it is no plain LoRA; it targets none of our modules, or its tensors are
        not exactly A and B of every targeted module of this model.
    """
    directory = checked_directory(directory)
    file = directory / "adapter_config.json"
    peft = read_json(file)
    for key, plain in _PLAIN_LORA.items():
        if peft.get(key, plain[0]) not in plain:
            raise UserError(f"{file} sets {key} to {peft[key]!r}; only plain LoRA ({key} = {plain[0]!r}) is supported")
    missing = [key for key in ("r", "lora_alpha", "target_modules") if key not in peft]
    if missing:
        raise UserError(f"{file} lacks the key {missing[0]!r}: export the adapter again")
    targets = names.matched_targets(config, peft["target_modules"])
    if not targets:
        raise UserError(f"{file}: target_modules {peft['target_modules']!r} names no module of this model")
    rank = peft["r"]
    places = names.adapter_names(config, targets)
    shapes = {}
    for name, (target, factor, _) in places.items():
        fan_in, fan_out = target_shapes(config)[target]
        shapes[name] = (rank, fan_in) if factor == "a" else (fan_out, rank)
    path = directory / "adapter_model.safetensors"
    tensors = read_header(path)
    _match(tensors, shapes, path, "it does not fit adapter_config.json and this model")
    weights: dict = {}
    for target in targets:
        weights[target] = {
            factor: jnp.stack([read_tensor(tensors[n]).T.astype(np.float32) for n in _factor(places, target, factor)])
            for factor in ("a", "b")
        }
    return LoRA(
        {"layers": weights},
        rank=rank,
        alpha=float(peft["lora_alpha"]),
        targets=targets,
        dropout=float(peft.get("lora_dropout", 0.0)),
    )


def _factor(places: dict[str, tuple[str, str, int]], target: str, factor: str) -> Iterable[str]:
    return (name for name, place in places.items() if place[:2] == (target, factor))


def fingerprint(directory: str | os.PathLike) -> str:
    """A short identity of a checkpoint that costs no full read: 16 hexadecimal digits.

    Hashes the values in `config.json`, each weight file's name, size and header, and 16 evenly spaced pages of its
    data, since checkpoints of one architecture share their headers. Copying or touching the files does not change it.

    Raises:
      UserError: as for `load_checkpoint`, as far as files and headers go.
    """
    directory = checked_directory(directory)
    digest = hashlib.sha256(json.dumps(read_json(directory / "config.json"), sort_keys=True).encode())
    for path in weight_files(directory)[0]:
        read_header(path)
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            file.seek(0)
            digest.update(file.read(start))
            for sample in range(_SAMPLES):
                file.seek(start + max(0, size - start - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
