"""Damages single files of a run's checkpoints: an intact one is read, or the damage is named."""

import random
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from damage import damaged

from gdsd_jax.training.checkpoint import _Saver, load_params


def make(directory: Path) -> dict[int, Any]:
    """Saves two checkpoints below `directory`, and returns their parameters by iteration."""
    found = {n: {"a": jax.numpy.full((3, 4), n / 2), "b": {"c": jax.numpy.arange(5.0) * n}} for n in (1, 2)}
    saver = _Saver(directory / "checkpoints", 2)
    for iteration, params in found.items():
        saver.save(iteration, {"state": {"params": params}}, {"position": iteration})
    saver.close()
    return found


def case(world: Any, draw: random.Random) -> None:
    """Damages, empties or removes one to three files of the checkpoints, and reads the parameters."""
    root = world.directory / "saved"
    if not root.exists():
        world.saved = make(root)
    work = world.directory / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(root, work)
    files = [path for path in sorted((work / "checkpoints").rglob("*")) if path.is_file()]
    for path in draw.sample(files, draw.randint(1, 3)):
        if draw.random() < 0.15:
            path.unlink()
        else:
            path.write_bytes(damaged(draw, path.read_bytes()))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), world.saved[1])
    places = jax.tree.map(lambda x: x.sharding, world.saved[1])
    params, iteration = load_params(work, shapes, places)
    same = jax.tree.map(np.array_equal, params, world.saved[iteration])
    assert all(jax.tree.leaves(same)), "other parameters were read than those saved"
