"""Computes means with errors and intervals, pass@k, and the paired comparison of two evaluations of the same items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit


def mean_and_error(values: np.ndarray) -> dict[str, float]:
    """Computes the mean of the values `[N]` and its standard error, which is 0 for a single value."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": float(values.mean()), "error": float(error)}


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Computes the mean and its 95 % interval (Student's t); `low` and `high` are None for fewer than two values."""
    mean = float(np.mean(values)) if len(values) else None
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None}
    half = float(stdtrit(len(values) - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def pass_at(correct: np.ndarray, samples: int, k: int) -> np.ndarray:
    """Estimates, for each item, the probability that at least one of k samples is right: `1 - C(n - c, k) / C(n, k)`.

    The estimate is unbiased for every k up to n (Chen et al. 2021, arXiv 2107.03374, Eq. 1), unlike `1 - (1 - c/n)^k`.
    Binomials are computed in integers, because they soon overflow floating point.

    Args:
      correct: numbers c of right samples, `[items]`.
      samples: the number n of samples of each item.
    """
    return np.array([1 - math.comb(samples - int(c), k) / math.comb(samples, k) for c in correct])


def paired(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """Computes the mean of `first - second` over the same items, its 95 % interval, and McNemar's exact test.

    The test is a two-sided binomial test of the items that exactly one of the two got right; under the null hypothesis
    each of the two is equally likely to be the right one. `p` is None if the values are not all 0 or 1. `better` and
    `worse` count the items with a positive and a negative difference.
    """
    # Imported only here, because scipy.stats takes a second to import.
    from scipy.stats import binomtest

    found = interval((first - second).tolist())
    binary = bool(np.isin([first, second], (0.0, 1.0)).all())
    only_first, only_second = int((first > second).sum()), int((second > first).sum())
    p = None
    if binary:
        split = only_first + only_second
        p = float(binomtest(only_first, split, 0.5).pvalue) if split else 1.0
    return {**found, "better": only_first, "worse": only_second, "p": p}
