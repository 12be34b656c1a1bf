"""Keeps the place of a run in its data, and skips prompts whose last groups were not worth an update.

Every pass over the data set has an order of its own. With `config.refill.revisit` below 1, a run remembers how often in
succession the groups of each prompt were rejected by `config.refill.select`. A prompt that is likely to be rejected
again is skipped before anything is sampled for it, and the next one of the order takes its place. GRESO
(arXiv 2506.02177) also skips prompts before the rollout, by their earlier rewards and by chance. It adapts its
probabilities during a run, while `revisit` is constant.
"""

from __future__ import annotations

import collections
from typing import Any, NamedTuple

import numpy as np

from gdsd_jax.config import RefillConfig
from gdsd_jax.runtime.errors import UserError


class Cursor(NamedTuple):
    """The place of a run in its data, which checkpoints hold.

    position: index, in the endless order of prompts, of the next one.
    rejections: `[rows]` int32, the number of groups of each row of the data set that were rejected since one was not;
      None if the run skips no prompt.
    """

    position: int = 0
    rejections: np.ndarray | None = None


class Ahead(NamedTuple):
    """The prompts that an iteration may ask, in this order.

    rows: their rows in the data set.
    ends: for each of them, the position of the cursor if it is the last one that is asked.
    """

    rows: list[int]
    ends: list[int]


def remembering(cursor: Cursor, rows: int, config: RefillConfig) -> Cursor:
    """Returns the cursor with the memory that a run over a data set of `rows` rows needs.

    Raises:
      UserError: the cursor remembers another number of rows.
    """
    if config.revisit == 1:
        return cursor._replace(rejections=None)
    if cursor.rejections is None:
        return cursor._replace(rejections=np.zeros(rows, np.int32))
    if len(cursor.rejections) != rows:
        raise UserError(
            f"the checkpoint remembers rejections of {len(cursor.rejections)} rows, and the training set has {rows}: "
            "restore the file of config.task.train_path, or choose another --workdir"
        )
    return cursor


def window(rows: int, count: int) -> int:
    """Returns how many positions an iteration looks through for `count` prompts: more than one pass over the rows."""
    return count + rows


def prompts_ahead(cursor: Cursor, order: Any, count: int, config: RefillConfig, draws: np.ndarray | None) -> Ahead:
    """Chooses the `count` prompts that the next iteration may ask.

    If the window has too few prompts that are not skipped, the skipped ones with the fewest rejections follow them, and
    earlier ones among equals. An iteration thus never lacks prompts, even if all were rejected.

    Args:
      order: gives the row of each position, `order[position]`.
      draws: `[window]` uniform numbers from 0 up to, but excluding, 1, one for each position; None if the run skips no
        prompt.
    """
    start = cursor.position
    if draws is None:
        return Ahead([order[start + i] for i in range(count)], [start + i + 1 for i in range(count)])
    rows, ends, skipped, passed = [], [], [], collections.Counter()
    for position, draw in enumerate(draws.tolist(), start):
        row = order[position]
        if draw < config.revisit ** int(cursor.rejections[row]):
            rows.append(row)
            ends.append(position + 1)
        else:
            # A prompt that comes up twice must not fill two places while others have as few rejections.
            skipped.append((int(cursor.rejections[row]) + passed[row], row))
            passed[row] += 1
        if len(rows) == count:
            return Ahead(rows, ends)
    lacking = count - len(rows)
    rows += [row for _, row in sorted(skipped, key=lambda entry: entry[0])[:lacking]]
    return Ahead(rows, ends + [start + len(draws)] * lacking)


def moved(cursor: Cursor, ahead: Ahead, used: int, worth: np.ndarray | None) -> tuple[Cursor, dict[str, float]]:
    """Returns the cursor after the first `used` prompts were asked, and how many prompts were skipped, as a metric.

    Args:
      worth: `[used]` bool, whether the group of each of these prompts was worth an update; None if the run skips none.
    """
    position, rejections = ahead.ends[used - 1], cursor.rejections
    if rejections is None:
        return Cursor(position), {}
    rejections = rejections.copy()
    for row, good in zip(ahead.rows[:used], worth, strict=True):
        rejections[row] = 0 if good else rejections[row] + 1
    return Cursor(position, rejections), {"refill/prompts_skipped": float(position - cursor.position - used)}
