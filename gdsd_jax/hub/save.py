"""Writes checkpoints and adapters that users of the original models can load unchanged.

A directory appears under its name only when it is complete, and tensors are gathered into host memory one by one. On
several hosts all processes take part in the gathers, the first process writes, and no process returns before the
directory is complete.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from gdsd_jax import families
from gdsd_jax.denoiser import DenoiserConfig, LoRA
from gdsd_jax.hub import names, outgoing
from gdsd_jax.hub.cards import adapter_card, model_card
from gdsd_jax.hub.files import checked_directory, read_json, require_own_files
from gdsd_jax.hub.load import BASE_FINGERPRINT, fingerprint, float_dtype
from gdsd_jax.runtime.errors import UserError

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


@contextmanager
def _new_directory(directory: str | os.PathLike, needed: int) -> Iterator[Path]:
    """Yields a temporary directory beside `directory`, renamed to `directory` on success and deleted on failure."""
    if re.match("[a-zA-Z0-9+.-]+:/", os.fspath(directory)):
        raise UserError(f"{directory}: an export is made on a disk: name a directory there and copy it")
    final = Path(directory).absolute()
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise UserError(f"{final} exists and is not empty: remove it or name another directory to export to")
    partial, lock = final.with_name(f".{final.name}.partial-{os.getpid()}"), None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _sweep(final)
        free = shutil.disk_usage(final.parent).free
        if free < needed + _SPARE_BYTES:
            raise UserError(
                f"not enough disk space for {final}: {needed + _SPARE_BYTES} bytes needed, {free} free: "
                "free some or name a directory on another disk"
            )
        partial.mkdir()
        lock = _held(partial)
        yield partial
        partial.rename(final)
    except OSError as error:
        raise UserError(f"cannot write {final}: {error}: choose a directory on a disk that takes it") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _held(directory: Path) -> int | None:
    """Locks a directory and returns the descriptor that holds the lock, or None if the directory is already locked.

    The lock lasts until the descriptor is closed or the process dies.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _sweep(final: Path) -> None:
    """Removes the partial directories that killed exports to `final` left behind."""
    for partial in final.parent.glob(f".{glob.escape(final.name)}.partial-*"):
        held = _held(partial) if partial.is_dir() and not partial.is_symlink() else None
        if held is not None:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(held)


def _write_together(
    directory: str | os.PathLike, needed: int, tensors: Mapping[str, outgoing.Outgoing], write: Callable[[Path], None]
) -> None:
    """Has the first process write a new directory, while all processes fetch `tensors` in the same order."""
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
    require_own_files(source, (*_SIDE_FILES, *_SIDE_PATTERNS, "README.md"))
    found = [source / name for name in _SIDE_FILES if (source / name).is_file()]
    return found + sorted(path for pattern in _SIDE_PATTERNS for path in source.glob(pattern) if path.is_file())


def _hub_code(auto_map: Mapping[str, Any], repository: str, source: epath.Path) -> dict[str, Any]:
    """Returns `auto_map` with every class whose Python file is not in the source redirected to the hub repository."""

    def point(reference: Any) -> Any:
        if isinstance(reference, list):
            return [point(item) for item in reference]
        if not isinstance(reference, str) or "--" in reference:
            return reference
        local = (source / f"{reference.partition('.')[0]}.py").is_file()
        return reference if local else f"{repository}--{reference}"

    return {key: point(reference) for key, reference in auto_map.items()}


def _record_dtype(hf: dict[str, Any], tensors: Mapping[str, outgoing.Outgoing]) -> None:
    """Sets the dtype that `config.json` records, if it records one, to the dtype that all tensors have."""
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
    """Writes a checkpoint directory with the family's tensor names.

    An adapter is merged in as `W + (alpha / r) (A B)^T`, computed in float32.

    Without `lora`, `training` and a change of dtype this is a copy: tensors and `config.json` are those of the source,
    byte for byte. Otherwise `config.json` keeps every key of the source, except that a recorded dtype is set to that of
    the tensors, and `auto_map` entries whose Python file is not in the source point at the family's hub repository.
    Tokenizer files, chat template, generation settings, Python files and licences are copied from the source.

    Args:
      directory: where the checkpoint is written; it must be absent or empty, and appears only when complete.
      config: the configuration as loaded; its shapes must be those of the source.
      base: parameters, numpy or JAX arrays.
      lora: adapter to merge; None writes the base alone.
      source: checkpoint directory that the base came from; None writes a new `config.json` from `config`.
      training: facts for the model card, name -> value.
      dtype: stored dtype; None keeps that of each parameter.
      max_shard_bytes: weights larger than this are written to several files with an index.

    Raises:
      UserError: the directory is not empty, the disk is too small, or parameters or source do not fit `config`.
    """
    dtype = float_dtype(dtype)
    tensors = outgoing.checkpoint_tensors(config, base, lora, dtype)
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
    if isinstance(hf.get("auto_map"), Mapping) and source is not None:
        hf["auto_map"] = _hub_code(hf["auto_map"], families.family_of(config).repository, source)
    shards = outgoing.shards_of(tensors, max_shard_bytes)

    def write(partial: Path) -> None:
        for path in side:
            (partial / path.name).write_bytes(path.read_bytes())
        if unchanged:
            (partial / "config.json").write_bytes((source / "config.json").read_bytes())
        else:
            _write_json(partial / "config.json", hf)
        for name, group in shards.items():
            outgoing.write_safetensors(partial / name, group)
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
      directory: where the adapter is written; it must be absent or empty.
      source: directory or hub name of the base, recorded as `base_model_name_or_path`.
      training: facts for the model card.

    Raises:
      UserError: the directory is not empty, the disk is too small, or the adapter does not fit the configuration.
    """
    outgoing.check_adapter(config, lora)
    there = source is not None and (Path(source) / "config.json").is_file()
    metadata = {BASE_FINGERPRINT: fingerprint(source)} if there else {}
    tensors = {}
    for name, (target, factor, layer) in sorted(names.adapter_names(config, lora.targets).items()):
        array = lora.weights["layers"][target][factor]

        def fetch(array=array, layer=layer) -> np.ndarray:
            return outgoing.turned(outgoing.layer_of(array, layer).astype(np.float32))

        tensors[name] = outgoing.Outgoing(np.dtype(np.float32), array.shape[:0:-1], fetch)

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
        outgoing.write_safetensors(partial / "adapter_model.safetensors", tensors, metadata)
        card = adapter_card(Path(directory).name, lora, source, training)
        (partial / "README.md").write_text(card, encoding="utf-8")

    _write_together(directory, sum(tensor.size for tensor in tensors.values()), tensors, write)
