"""Keeps `run.json`, the record of a run: its config and the fingerprint of its base, which a resumed run must match."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gdsd_jax import hub
from gdsd_jax.config import TrainConfig, default, freeze, to_dict
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.files import read_object, understood, write_text

# Settings that may differ between the run that saved and the run that resumes: those that do not affect the results,
# those that affect only the order of sums and thus their rounding, and those of the run's length.
FREE_TO_CHANGE = (
    "save_every", "keep", "completions_logged", "trackers", "tensorboard", "wandb", "profile", "evaluation", "hosts",
    "dry_run", "adapter_base", "sft.save_every",
)  # fmt: skip
ROUNDING_ONLY = (
    "mesh", "rollout_rows", "microbatch_rows", "component_norms_every", "model.remat", "model.vocab_chunk",
    "model.layer_unroll", "model.attention", "sft.microbatch_rows",
)  # fmt: skip
LENGTH = ("iterations", "optimizer.schedule_updates", "extras_optimizer.schedule_updates")


def record_path(workdir: Path) -> Path:
    """Returns the path of the record in a workdir."""
    return workdir / "run.json"


def read_record(workdir: Path) -> dict[str, Any]:
    """Reads the record of a training run; settings that an older record lacks get their defaults.

    Raises:
      UserError: there is no record, or it is damaged.
    """
    path = record_path(workdir)
    if not path.is_file():
        raise UserError(f"{workdir} holds no training run: train first, or give another --workdir or a --checkpoint")
    advice = "restore it or give another --workdir"
    record = read_object(path, advice)
    if not (isinstance(record.get("config"), dict) and isinstance(record.get("base"), str)):
        raise UserError(f"{path} is not the record of a run: {advice}")
    with understood(path, advice):
        record["config"] = _completed(record["config"], to_dict(freeze(TrainConfig, default())))
    return record


def keep_record(workdir: Path, config: TrainConfig, data: str | None = None) -> str | None:
    """Writes the record of a new run, or compares the record of an old run with the config that resumes it.

    Args:
      data: a digest of the training rows, since a run goes on at a place in them; None, here or in the record, is not
        compared.

    Returns:
      A line for the user if the run continues with other rounding than before, else None.

    Raises:
      UserError: the workdir belongs to a run with another config, base or training rows, or to another kind of run.
    """
    if record_path(workdir).exists():
        require_same_run(workdir, config)
        if data is not None and read_record(workdir).get("data", data) != data:
            raise UserError(
                f"{workdir} belongs to a run on other training rows: restore the file, task or tokenizer that gave "
                "them, or choose another --workdir"
            )
        return _within_rounding(workdir, config)
    metrics = workdir / "metrics.jsonl"
    if metrics.exists() and metrics.stat().st_size:
        raise UserError(f"{workdir} holds metrics of another kind of run: choose another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    record = {"config": to_dict(config), "base": hub.fingerprint(config.checkpoint)}
    record |= {} if data is None else {"data": data}
    write_text(record_path(workdir), json.dumps(record, indent=1) + "\n")
    return None


def _within_rounding(workdir: Path, config: TrainConfig) -> str | None:
    """Returns a line that names the changed settings that affect the rounding, or None if there are none."""
    different = _differences(read_record(workdir)["config"], to_dict(config))
    changed = [f"config.{name}" for name in different if _under(name, ROUNDING_ONLY)]
    if not changed:
        return None
    masks = ", and other dropout masks" if config.lora.dropout else ""
    return f"{', '.join(changed)} changed since the run began: it goes on with other rounding{masks}, not bit by bit"


def with_first_schedule(config: TrainConfig, workdir: Path) -> TrainConfig:
    """Returns the config with the lengths of the learning-rate schedules, unless the config sets them.

    The length is that of the run in `workdir` when it was first started, or that of the config for a new run. Otherwise
    an extended run would go back to an earlier and higher point of a decaying schedule.
    """
    first = read_record(workdir)["config"] if record_path(workdir).exists() else to_dict(config)
    lengths = {}
    for name in ("optimizer", "extras_optimizer"):
        optimizer = getattr(config, name)
        if optimizer.schedule_updates is None:
            with understood(record_path(workdir), "restore it or give another --workdir"):
                updates = first[name].get("schedule_updates") or first["iterations"] * first["inner_updates"]
            lengths[name] = dataclasses.replace(optimizer, schedule_updates=updates)
    return dataclasses.replace(config, **lengths)


def require_same_run(workdir: Path, config: TrainConfig, *, fixed: Iterable[str] = (), base: str | None = None) -> None:
    """Compares a config with the record in `workdir`.

    Args:
      fixed: settings that must not differ, although they may in other comparisons.
      base: the fingerprint of the base; None: it is computed.

    Raises:
      UserError: a setting or the base differs; the message names it.
    """
    record = read_record(workdir)
    free = set(FREE_TO_CHANGE + ROUNDING_ONLY + LENGTH) - set(fixed)
    changed = [name for name in _differences(record["config"], to_dict(config)) if not _under(name, free)]
    if changed:
        raise UserError(f"{workdir} belongs to a run with another config.{changed[0]}: choose another --workdir")
    if record["base"] != (base or hub.fingerprint(config.checkpoint)):
        raise UserError(f"{workdir} belongs to another base than {config.checkpoint}: choose another --workdir")


def _under(name: str, settings: Iterable[str]) -> bool:
    """Returns whether a dotted name is one of the settings, or part of one."""
    return any(name == setting or name.startswith(f"{setting}.") for setting in settings)


def _completed(saved: Any, defaults: Any) -> Any:
    """Returns nested settings with the defaults of those that are missing."""
    if not (isinstance(saved, dict) and isinstance(defaults, dict)):
        return saved
    return defaults | {name: _completed(value, defaults.get(name)) for name, value in saved.items()}


def _differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Returns the dotted names of nested settings that differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(set(a) | set(b))
        return [d for k in keys for d in _differences(a.get(k), b.get(k), f"{path}.{k}" if path else k)]
    return [] if a == b else [path]
