"""Writes checkpoints and adapters that the models' original users can load as they are.

A directory appears under its name only when it is complete, and one tensor at a time is gathered into host memory. On
several hosts all processes take part in the gathers, the first writes, and none returns before the directory is there.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from gdsd_jax import families
from gdsd_jax.denoiser import DenoiserConfig, LoRA
from gdsd_jax.denoiser.lora import target_shapes
from gdsd_jax.hub import names
from gdsd_jax.hub.cards import adapter_card, model_card
from gdsd_jax.hub.files import FLOATS, checked_directory, read_json
from gdsd_jax.runtime.errors import UserError

_CODES = {dtype: code for code, dtype in FLOATS.items()}
_SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
_SIDE_PATTERNS = ("*.py", "LICENSE*", "NOTICE*")
_SPARE_BYTES = 16 << 20  # room for headers, index and small files


class Outgoing(NamedTuple):
    """A tensor to be written: what the header says of it, and how to get its bytes."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fetch: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape))


def _host(array: Any) -> np.ndarray:
    """An array in host memory; every process must ask if it spans several."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def _layer(array: Any, layer: int | None) -> Any:
    """One layer of a stacked parameter, without sending what the host has to a device."""
    if layer is None:
        return array
    return _pick(array, np.int32(layer)) if isinstance(array, jax.Array) else np.asarray(array)[layer]


@jax.jit
def _pick(stack: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False)


@functools.partial(jax.jit, static_argnames="dtype")
def _merged(w: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, *, dtype: np.dtype) -> jax.Array:
    """`W + scale * A B` in float32, rounded once."""
    a, b = (factor.astype(jnp.float32) for factor in (a, b))
    delta = jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)
    return (w.astype(jnp.float32) + scale * delta).astype(dtype)


def _turned(array: Any) -> np.ndarray:
    """The transpose in host memory, made by the devices; where those are CPUs by sending, which turns as it copies."""
    if isinstance(array, jax.Array) and next(iter(array.devices())).platform != "cpu":
        return _host(jnp.swapaxes(array, 0, 1))
    return np.asarray(jax.device_put(_host(array).T, jax.local_devices(backend="cpu")[0]))


def _outgoing(config: DenoiserConfig, base: Mapping, lora: LoRA | None, dtype: np.dtype | None) -> dict[str, Outgoing]:
    """Every tensor of the checkpoint by its stored name, the adapter merged in where there is one."""
    tensors = {}
    slots = names.slots(config)
    if lora is not None:
        _check_adapter(config, lora)
    paths = {tuple(key.key for key in keys) for keys, _ in jax.tree_util.tree_leaves_with_path(base)}
    for kind, odd in (("lack", set(names.parameters(config)) - paths), ("hold", paths - set(names.parameters(config)))):
        if odd:
            raise UserError(f"the parameters {kind} {'/'.join(min(odd))}, unlike their configuration")
    for name in sorted(slots):
        slot = slots[name]
        array = names.at(base, slot.path)
        matrix = slot.shape[::-1] if slot.transposed else slot.shape
        wanted = matrix if slot.layer is None else (config.num_layers, *matrix)
        if tuple(array.shape) != wanted:
            raise UserError(f"parameter {'/'.join(slot.path)} has shape {tuple(array.shape)}, not {wanted}")
        held = np.dtype(array.dtype)
        target = dtype or held
        if target not in _CODES:
            raise UserError(f"parameter {'/'.join(slot.path)} cannot be stored as {target}: give dtype='bfloat16'")
        factors = lora.weights["layers"].get(slot.path[1]) if lora is not None and slot.transposed else None

        def fetch(array=array, slot=slot, factors=factors, target=target) -> np.ndarray:
            tensor = _layer(array, slot.layer)
            if factors is not None:
                a, b = (_layer(factors[name], slot.layer) for name in "ab")
                tensor = _merged(tensor, a, b, np.float32(lora.alpha / lora.rank), dtype=target)
            elif tensor.dtype != target:
                tensor = tensor.astype(target)
            return _turned(tensor) if slot.transposed else np.ascontiguousarray(_host(tensor))

        tensors[name] = Outgoing(target, slot.shape, fetch)
    return tensors


def _check_adapter(config: DenoiserConfig, lora: LoRA) -> None:
    for target in lora.targets:
        fan_in, fan_out = target_shapes(config)[target]
        for factor, shape in (("a", (fan_in, lora.rank)), ("b", (lora.rank, fan_out))):
            found = tuple(lora.weights["layers"][target][factor].shape)
            if found != (config.num_layers, *shape):
                raise UserError(f"adapter weight {target}/{factor} has shape {found}: it is of another model")


def _write_safetensors(path: Path, tensors: Mapping[str, Outgoing]) -> None:
    """Streams tensors into a safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in tensors.items():
        span = [position, position + tensor.size]
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        position += tensor.size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        # One tensor is fetched while the one before is written.
        with ThreadPoolExecutor(1) as pool:
            ahead = None
            for tensor in [*tensors.values(), None]:
                before, ahead = ahead, tensor and pool.submit(tensor.fetch)
                if before:
                    file.write(before.result().reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _shards(tensors: Mapping[str, Outgoing], max_bytes: int) -> dict[str, dict[str, Outgoing]]:
    """Tensors grouped by file name, in order, each file at most `max_bytes` unless one tensor alone is larger."""
    groups: list[dict[str, Outgoing]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if groups[-1] and filled + tensor.size > max_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = tensor
        filled += tensor.size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


@contextmanager
def _new_directory(directory: str | os.PathLike, needed: int) -> Iterator[Path]:
    """A temporary sibling that takes the name `directory` on success and vanishes on failure."""
    if os.fspath(directory).startswith(("gs:/", "s3:/")):
        raise UserError(f"{directory}: an export is made on a disk: name a directory there and copy it")
    final = Path(directory).absolute()
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise UserError(f"{final} exists and is not empty: remove it or name another directory to export to")
    partial = final.with_name(f".{final.name}.partial-{os.getpid()}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(final.parent).free
        if free < needed + _SPARE_BYTES:
            raise UserError(
                f"not enough disk space for {final}: {needed + _SPARE_BYTES} bytes needed, {free} free: "
                "free some or name a directory on another disk"
            )
        partial.mkdir()
        yield partial
        partial.rename(final)
    except OSError as error:
        raise UserError(f"cannot write {final}: {error}: choose a directory on a disk that takes it") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_together(
    directory: str | os.PathLike, needed: int, tensors: Mapping[str, Outgoing], write: Callable[[Path], None]
) -> None:
    """Has the first process write a new directory, in which it fetches `tensors` in their order, as all others do."""
    if jax.process_index() == 0:
        with _new_directory(directory, needed) as partial:
            write(partial)
    else:
        for tensor in tensors.values():
            tensor.fetch()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"export to {directory}")


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _side_files(source: epath.Path) -> list[epath.Path]:
    found = [source / name for name in _SIDE_FILES if (source / name).is_file()]
    return found + sorted(path for pattern in _SIDE_PATTERNS for path in source.glob(pattern) if path.is_file())


def _hub_code(auto_map: Mapping[str, Any], repository: str, source: epath.Path) -> dict[str, Any]:
    """`auto_map` with every class whose module is not in the source pointed at the hub repository that has it."""

    def point(reference: Any) -> Any:
        if isinstance(reference, list):
            return [point(item) for item in reference]
        if not isinstance(reference, str) or "--" in reference:
            return reference
        local = (source / f"{reference.partition('.')[0]}.py").is_file()
        return reference if local else f"{repository}--{reference}"

    return {key: point(reference) for key, reference in auto_map.items()}


def _record_dtype(hf: dict[str, Any], tensors: Mapping[str, Outgoing]) -> None:
    """Keeps the dtype that a `config.json` records true of the tensors beside it."""
    dtypes = {tensor.dtype.name for tensor in tensors.values()}
    for key in ("torch_dtype", "dtype"):
        if key in hf and len(dtypes) == 1:
            hf[key] = dtypes.pop()
            return


def export_checkpoint(
    directory: str | os.PathLike,
    config: DenoiserConfig,
    base: Mapping,
    *,
    lora: LoRA | None = None,
    source: str | os.PathLike | None = None,
    training: Mapping[str, Any] | None = None,
    dtype: Any = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a checkpoint directory: the family's tensor names, the adapter merged as `W + (alpha / r) A B` in float32.

    Without `lora`, `training` and a change of dtype this is a copy: tensors and `config.json` come out byte for byte as
    they came in. Otherwise `config.json` keeps every key of the source; only a recorded dtype follows the tensors, and
    `auto_map` entries whose Python file is not in the source point at the family's repository on the hub.
    Tokenizer files, chat template, generation settings, Python files and licences are copied from the source.

    Args:
      directory: where to; must be absent or empty. It appears under this name only when complete.
      config: as loaded; its shapes must be those of the source.
      base: parameters, numpy or JAX arrays.
      lora: adapter to merge; None writes the base alone.
      source: checkpoint directory that the base came from; None writes a `config.json` of our own.
      training: facts for the model card, name -> value.
      dtype: stored dtype; None keeps that of each parameter.
      max_shard_bytes: above this the weights go into several files with an index.

    Raises:
      UserError: the directory is not empty, the disk is too small, parameters or source do not fit the configuration.
    """
    dtype = None if dtype is None else np.dtype(jnp.dtype(dtype))
    tensors = _outgoing(config, base, lora, dtype)
    total = sum(tensor.size for tensor in tensors.values())
    side: list[epath.Path] = []
    if source is None:
        hf = names.hf_config(config)
    else:
        source = checked_directory(source)
        hf = read_json(source / "config.json")
        ids = {name: getattr(config, name) for name in ("mask_token_id", "eos_token_id", "pad_token_id")}
        if names.slots(families.read_config(hf | ids)) != names.slots(config):
            raise UserError(f"{source} is a model of other shapes than the parameters: name the base they came from")
        side = _side_files(source)
    before = dict(hf)
    _record_dtype(hf, tensors)
    unchanged = source is not None and lora is None and training is None and hf == before
    if "auto_map" in hf and source is not None:
        hf["auto_map"] = _hub_code(hf["auto_map"], families.family_of(config).repository, source)
    shards = _shards(tensors, max_shard_bytes)

    def write(partial: Path) -> None:
        for path in side:
            (partial / path.name).write_bytes(path.read_bytes())
        if unchanged:
            (partial / "config.json").write_bytes((source / "config.json").read_bytes())
        else:
            _write_json(partial / "config.json", hf)
        for name, group in shards.items():
            _write_safetensors(partial / name, group)
        if len(shards) > 1:
            weight_map = {tensor: name for name, group in shards.items() for tensor in group}
            _write_json(
                partial / "model.safetensors.index.json",
                {"metadata": {"total_size": total}, "weight_map": weight_map},
            )
        kept = (source / "README.md") if unchanged else None
        if kept is not None and kept.is_file():
            (partial / "README.md").write_bytes(kept.read_bytes())
        else:
            card = model_card(Path(directory).name, config, lora, source, training)
            (partial / "README.md").write_text(card, encoding="utf-8")

    _write_together(directory, total + sum(path.stat().length for path in side), tensors, write)


def export_adapter(
    directory: str | os.PathLike,
    config: DenoiserConfig,
    lora: LoRA,
    *,
    source: str | os.PathLike | None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Writes a PEFT directory: `adapter_config.json`, `adapter_model.safetensors` in float32, a model card.

    Args:
      directory: where to; must be absent or empty.
      source: directory or hub name of the base, recorded as `base_model_name_or_path`.
      training: facts for the model card.

    Raises:
      UserError: the directory is not empty, the disk is too small, the adapter does not fit the configuration.
    """
    _check_adapter(config, lora)
    tensors = {}
    for name, (target, factor, layer) in sorted(names.adapter_names(config, lora.targets).items()):
        array = lora.weights["layers"][target][factor]

        def fetch(array=array, layer=layer) -> np.ndarray:
            return _turned(_layer(array, layer).astype(np.float32))

        tensors[name] = Outgoing(np.dtype(np.float32), array.shape[:0:-1], fetch)

    def write(partial: Path) -> None:
        _write_json(
            partial / "adapter_config.json",
            {
                "base_model_name_or_path": None if source is None else str(source),
                "bias": "none",
                "fan_in_fan_out": False,
                "inference_mode": True,
                "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
                "lora_dropout": lora.dropout,
                "peft_type": "LORA",
                "r": lora.rank,
                "target_modules": names.target_modules(config, lora.targets),
                "task_type": families.family_of(config).task_type,
            },
        )
        _write_safetensors(partial / "adapter_model.safetensors", tensors)
        card = adapter_card(Path(directory).name, lora, source, training)
        (partial / "README.md").write_text(card, encoding="utf-8")

    _write_together(directory, sum(tensor.size for tensor in tensors.values()), tensors, write)
