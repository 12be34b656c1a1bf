"""Recognises an update that is not finite, and saves the batch on which training diverged."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from gdsd_jax.hub.tokenizer import Tokenizer
from gdsd_jax.runtime import hosts
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.transfer import fetch
from gdsd_jax.training.rollout import Rewarded, completion_records


def is_finite(metrics: Mapping[str, float]) -> bool:
    """Returns whether an update is finite, by the metrics of its iteration."""
    return bool(np.isfinite([metrics[name] for name in ("loss", "grad/norm", "update/norm")]).all())


def diverged(workdir: Path, iteration: int, rewarded: Rewarded, tokenizer: Tokenizer, latest: int | None) -> UserError:
    """Saves the rollouts on which training diverged, and returns the error that says so.

    It writes `workdir/diverged/ITERATION.npz` (the arrays of the batch: tokens, masks, rewards, commit steps, ...) and
    `ITERATION.json` (texts, reward components).

    Args:
      latest: the iteration of the last checkpoint, or None if there is none.
    """
    directory = workdir / "diverged"
    fields = {field.name: getattr(rewarded.batch, field.name) for field in dataclasses.fields(rewarded.batch)}
    # Static fields, such as the sampler's settings, are no arrays: a device could not return them, nor NumPy load them.
    arrays = fetch({name: value for name, value in fields.items() if isinstance(value, (jax.Array, np.ndarray))})
    if hosts.first():
        directory.mkdir(parents=True, exist_ok=True)
        np.savez(directory / f"{iteration}.npz", **arrays)
        rows = completion_records(rewarded, tokenizer, range(len(rewarded.completions)))
        (directory / f"{iteration}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    kept = "there is no checkpoint yet" if latest is None else f"the last good checkpoint is that of iteration {latest}"
    return UserError(
        f"the update of iteration {iteration} is not finite; its batch is in {directory / f'{iteration}.npz'}, {kept}: "
        "lower config.optimizer.learning_rate, or psi, or set a clip (eps_low, eps_high) in config.settings, "
        "and start in another --workdir"
    )
