"""A task on which four of five groups have no advantages, and a function that selects the groups to train on.

    python -m gdsd_jax.sft --config configs/tiny_sudoku.py --workdir runs/start_biased
    python -m gdsd_jax.train --config configs/tiny_sudoku.py --workdir runs/refill \
        --config.task.name=examples.refill:TASK --config.task.train_rows=200 --config.prompts_per_iteration=8 \
        --config.microbatch_rows=64 --config.optimizer.learning_rate=3e-4 --config.refill.rounds=8 \
        --config.refill.revisit=0.5 --config.refill.select=examples.refill:widest

The task is Sudoku, but four of five puzzles earn nothing, whatever the answer. Without refill four fifths of an
update's rows have no advantage. With it, further prompts are sampled until every group has advantages, in at most eight
further rounds; `refill/rows_sampled` and `refill/rows_dropped` say how many rows that cost. With `revisit` below 1 the
run also remembers which puzzles earned nothing, and rarely asks them again (docs/updates.md has figures).
"""

import dataclasses
import zlib

from gdsd_jax.tasks import TASKS


def pays(row: dict) -> bool:
    """Returns whether a puzzle earns anything: one in five does."""
    return zlib.crc32(row["puzzle"].encode()) % 5 == 0


def score(completion: str, row: dict) -> dict[str, float]:
    """Returns Sudoku's reward, or 0 for a puzzle that does not pay."""
    return {name: value * pays(row) for name, value in TASKS["sudoku"].score(completion, row).items()}


TASK = dataclasses.replace(TASKS["sudoku"], name="sudoku_few", score=score)


def widest(candidates):
    """Returns the spread of rewards of each group: the groups with the widest spread are taken first."""
    return candidates.rewards.std(axis=1)
