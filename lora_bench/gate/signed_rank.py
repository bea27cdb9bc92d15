"""The signed-rank test, exact, and the interval that belongs to it: few values, and nothing assumed of their spread.

Source: Wilcoxon 1945, Individual comparisons by ranking methods; Hollander, Wolfe and Chicken, Nonparametric
Statistical Methods, sections 3.1 to 3.3.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from lora_bench.bench.ratio import Interval

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST = 50
"""Values for which the distribution is counted out: the 2^n choices of signs are still counted exactly in a float."""


def p_above(values: Sequence[float], limit: float) -> float:
    """The chance of values so far above `limit`, were they symmetric about it or about something less.

    Equal distances share the mean of their ranks, and a value at the limit itself counts against "above".

    Raises ValueError for no values, more than 50, or one that is not finite.
    """
    _check(values)
    distances = np.asarray(values, dtype=float) - limit
    ranks = _doubled_ranks(np.abs(distances))
    seen = int(ranks[distances > 0].sum())
    counts = _counts(tuple(sorted(int(rank) for rank in ranks)))
    return float(counts[seen:].sum() / 2.0 ** len(values))


def p_below(values: Sequence[float], limit: float) -> float:
    """The chance of values so far below `limit`, were they symmetric about it or about something more."""
    return p_above([-value for value in values], -limit)


def centre(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The Hodges-Lehmann estimate, the median of all pairs' means, with the interval that the test would not reject.

    Under 6 values no such interval covers 95 %: it is then unbounded.

    Raises ValueError as `p_above`.
    """
    _check(values)
    count = len(values)
    given = np.asarray(values, dtype=float)
    first, second = np.triu_indices(count)
    means = np.sort((given[first] + given[second]) / 2)
    counts = _counts(tuple(range(2, 2 * count + 1, 2)))[::2]  # of whole ranks
    below = np.cumsum(counts) / 2.0**count  # P(sum of ranks <= k)
    rank = int(np.searchsorted(below, (1 - confidence) / 2, side="right"))
    low, high = (float(means[rank - 1]), float(means[-rank])) if rank else (-math.inf, math.inf)
    return Interval(float(np.median(means)), low, high, confidence)


def _check(values: Sequence[float]) -> None:
    if not 1 <= len(values) <= MOST:
        raise ValueError(f"a signed-rank test takes 1 to {MOST} values, got {len(values)}")
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"a signed-rank test needs finite values, got {list(values)[:5]}")


def _doubled_ranks(sizes: np.ndarray) -> np.ndarray:
    """Twice the rank of each size, so that the mean rank of equal ones is whole."""
    ordered = np.sort(sizes)
    first, last = np.searchsorted(ordered, sizes, "left"), np.searchsorted(ordered, sizes, "right")
    return np.asarray(first + last + 1)


@lru_cache(maxsize=4096)
def _counts(doubled_ranks: tuple[int, ...]) -> np.ndarray:
    """In how many of the 2^n choices of signs the positive (doubled) ranks sum to each number."""
    counts = np.zeros(sum(doubled_ranks) + 1)
    counts[0] = 1
    for rank in doubled_ranks:
        counts[rank:] += counts[:-rank].copy()
    return counts
