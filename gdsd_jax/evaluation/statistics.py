"""What a handful of numbers says: means with errors, pass@k, and two evaluations of the same items side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit


def mean_and_error(values: np.ndarray) -> dict[str, float]:
    """The mean over items and its standard error, 0 for a single item."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": float(values.mean()), "error": float(error)}


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean and its 95 % interval by Student's t over the values; `low` and `high` are None for fewer than two."""
    mean = float(np.mean(values)) if len(values) else None
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None}
    half = float(stdtrit(len(values) - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def pass_at(correct: np.ndarray, samples: int, k: int) -> np.ndarray:
    """`1 - C(n - c, k) / C(n, k)` of each item: how often k of its n samples, c of them right, hold a right one.

    Unbiased for every k up to n (Chen et al. 2021, arXiv 2107.03374, Eq. 1), unlike `1 - (1 - c/n)^k`; in integers,
    because the binomials leave floating point early.
    """
    return np.array([1 - math.comb(samples - int(c), k) / math.comb(samples, k) for c in correct])


def paired(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """`first - second` over the same items: mean and 95 % interval of the difference, and an exact test where it fits.

    `p` is the exact two-sided McNemar test: of the items that only one of the two got right, either was equally likely
    to be the one (a binomial test). None where the values are not all 0 or 1.
    """
    # Late: scipy.stats takes a second to import.
    from scipy.stats import binomtest

    found = interval((first - second).tolist())
    binary = bool(np.isin([first, second], (0.0, 1.0)).all())
    only_first, only_second = int((first > second).sum()), int((second > first).sum())
    p = None
    if binary:
        split = only_first + only_second
        p = float(binomtest(only_first, split, 0.5).pvalue) if split else 1.0
    return {**found, "better": only_first, "worse": only_second, "p": p}
