"""Keeps the batch on which training broke."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from gdsd_jax.hub.tokenizer import Tokenizer
from gdsd_jax.runtime import hosts
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.training.rollout import Rewarded


def diverged(workdir: Path, iteration: int, rewarded: Rewarded, tokenizer: Tokenizer, latest: int | None) -> UserError:
    """Saves the rollouts on which training broke and returns the error that says so.

    Writes `workdir/diverged/ITERATION.npz` (tokens, masks, rewards, commit steps, confidences) and `ITERATION.json`
    (texts, reward components).

    Args:
      latest: the iteration of the last good checkpoint, or None if there is none.
    """
    # Imported late, because only a run that diverges needs these.
    from gdsd_jax.runtime.transfer import fetch
    from gdsd_jax.training.rollout import completion_records

    directory = workdir / "diverged"
    fields = {field.name: getattr(rewarded.batch, field.name) for field in dataclasses.fields(rewarded.batch)}
    arrays = fetch({name: value for name, value in fields.items() if value is not None})
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
