"""Provides the smallest run that still learns something, for tests of whole commands."""

import dataclasses
from pathlib import Path
from types import ModuleType

from gdsd_jax.config.flags import launch
from gdsd_jax.hub import tiny
from gdsd_jax.tasks import sudoku

ROWS = 8

CONFIG = """
from gdsd_jax import config as settings


def get_config():
    config = settings.default(checkpoint={checkpoint!r})
    with config.unlocked():
        config.task.update(name="tiny_run:TASK", train_rows=8)
        config.task.settings = {{"template": "{{puzzle}}"}}
        config.prompt_buckets = (18,)
        config.overlong_prompts = "error"
        config.model.update(dtype="float32", remat="none", vocab_chunk=128)
        config.lora.update(rank=2, alpha=4.0, dropout=0.0, targets=("q", "down"))
        config.optimizer.learning_rate = 0.05
        config.sampler.update(completion_length=8, steps=4, block_length=4)
        config.evaluation.update(count=8, split="test", batch_rows=8, evaluation_prompt=False, lengths=(8,))
        config.update(iterations=2, prompts_per_iteration=2, group_size=2, inner_updates=1, microbatch_rows=2)
        config.update(save_every=1, completions_logged=2)
    return config
"""


def _even(completion: str, row: dict) -> dict[str, float]:
    """Returns a reward that random weights earn in part, so that there is something to learn from the start."""
    return {"even": sum(ord(c) % 2 == 0 for c in completion) / 8}


TASK = dataclasses.replace(sudoku.TASK, name="even", score=_even, weights={"even": 1.0})


def build(directory: Path) -> Path:
    """Writes a tiny checkpoint and a config file that trains it, and returns the file."""
    sizes = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 64, "max_length": 64}
    tiny.build(directory / "base", **sizes)
    file = directory / "config.py"
    file.write_text(CONFIG.format(checkpoint=str(directory / "base")))
    return file


def command(module: ModuleType, *arguments: object) -> None:
    """Runs `python -m MODULE ARGUMENTS` in this process."""
    options = getattr(module, "OPTIONS", None)
    launch(module.main, options, needs_workdir=options is None, argv=["command", *map(str, arguments)])
