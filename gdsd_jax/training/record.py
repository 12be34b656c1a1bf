"""`run.json`, the record of a run: its config and the fingerprint of its base; a resumed run must match it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gdsd_jax import hub
from gdsd_jax.config import TrainConfig, default, freeze, to_dict
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.files import write_text

# Settings that may differ between the run that saved and the run that resumes.
FREE_TO_CHANGE = (
    "iterations", "save_every", "keep", "completions_logged", "trackers", "tensorboard", "wandb", "profile",
    "evaluation", "mesh", "hosts", "dry_run",
)  # fmt: skip


def record_path(workdir: Path) -> Path:
    """Returns the path of the record in a workdir."""
    return workdir / "run.json"


def read_record(workdir: Path) -> dict[str, Any]:
    """Reads the record of a training run.

    Raises:
      UserError: there is none, or it does not parse.
    """
    path = record_path(workdir)
    if not path.is_file():
        raise UserError(f"{workdir} holds no training run: train first, or give another --workdir or a --checkpoint")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} does not parse ({error}): restore it or give another --workdir") from None


def keep_record(workdir: Path, config: TrainConfig) -> None:
    """Writes the record of a new run; compares the record of an old run with the config that resumes it.

    Raises:
      UserError: the workdir belongs to a run with another config or base, or to another kind of run.
    """
    if record_path(workdir).exists():
        require_same_run(workdir, config)
        return
    metrics = workdir / "metrics.jsonl"
    if metrics.exists() and metrics.stat().st_size:
        raise UserError(f"{workdir} holds metrics of another kind of run: choose another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    record = {"config": to_dict(config), "base": hub.fingerprint(config.checkpoint)}
    write_text(record_path(workdir), json.dumps(record, indent=1) + "\n")


def require_same_run(workdir: Path, config: TrainConfig, *, fixed: Iterable[str] = (), base: str | None = None) -> None:
    """Compares a config with the record in `workdir`.

    Args:
      fixed: settings of `FREE_TO_CHANGE` that may not differ here.
      base: fingerprint of the base, where the caller has it already.

    Raises:
      UserError: a setting or the base differs; the message names it.
    """
    record = read_record(workdir)
    free = set(FREE_TO_CHANGE) - set(fixed)
    changed = [name for name in _changed(record["config"], to_dict(config)) if name.split(".")[0] not in free]
    if changed:
        raise UserError(f"{workdir} belongs to a run with another config.{changed[0]}: choose another --workdir")
    if record["base"] != (base or hub.fingerprint(config.checkpoint)):
        raise UserError(f"{workdir} belongs to another base than {config.checkpoint}: choose another --workdir")


def _changed(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Returns the dotted names that differ; a record that is older than a setting has the setting's default."""
    return _differences(_completed(saved, to_dict(freeze(TrainConfig, default()))), wanted)


def _completed(saved: Any, defaults: Any) -> Any:
    if not (isinstance(saved, dict) and isinstance(defaults, dict)):
        return saved
    return defaults | {name: _completed(value, defaults.get(name)) for name, value in saved.items()}


def _differences(a: Any, b: Any, path: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(set(a) | set(b))
        return [d for k in keys for d in _differences(a.get(k), b.get(k), f"{path}.{k}" if path else k)]
    return [] if a == b else [path]
