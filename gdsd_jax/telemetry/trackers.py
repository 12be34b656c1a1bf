"""Copies of a run's metrics for TensorBoard and Weights & Biases."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from gdsd_jax.runtime.errors import UserError


def import_optional(package: str, setting: str) -> Any:
    try:
        return __import__(package)
    except ImportError as error:
        raise UserError(
            f"config.{setting} needs the package {package}, which cannot be imported ({error}): "
            f"pip install {package}, or set config.{setting}=False"
        ) from error


def open_tensorboard(module: Any, workdir: Path, resume_step: int | None) -> tuple[Any, Any]:
    purge = None if resume_step is None else resume_step + 1
    board = module.SummaryWriter(logdir=str(workdir / "tensorboard"), purge_step=purge)

    def write(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            board.add_scalar(name, value, step)
        board.flush()

    return write, board.close


def open_wandb(module: Any, workdir: Path, resume_step: int | None) -> tuple[Any, Any]:
    # The name is the run's identity, so that a resumed run goes on in the same plot.
    identity = workdir / "wandb_id.txt"
    if resume_step is None or resume_step < 0 or not identity.exists():
        identity.write_text(f"{workdir.resolve().name}-{time.time_ns():x}\n")
    run = module.init(
        dir=str(workdir),
        project=os.environ.get("WANDB_PROJECT", "gdsd_jax"),
        id=identity.read_text().strip(),
        name=os.environ.get("WANDB_NAME", workdir.resolve().name),
        resume="allow",
    )
    return lambda step, values: run.log(values, step=step), run.finish
