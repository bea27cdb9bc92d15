"""Medians and ratios with distribution-free intervals: timings are never normal."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence


class Interval(NamedTuple):
    """A median with the interval that covers the true one with at least `confidence`."""

    median: float
    low: float
    high: float
    confidence: float = 0.95


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The sample median between two order statistics, the sign test's interval.

    Source: Conover, Practical Nonparametric Statistics, section 3.2. Under 6 values no two order statistics cover
    95 %: the interval is then unbounded.

    Raises ValueError for no values or a value that is not finite.
    """
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"a median needs finite values, got {list(values)[:5]}")
    ordered, count = sorted(values), len(values)
    tail, rank = 0.0, 0
    # The largest rank k with P(Binomial(n, 1/2) < k) <= (1 - confidence) / 2.
    while (tail := tail + math.comb(count, rank) / 2**count) <= (1 - confidence) / 2:
        rank += 1
    low, high = (ordered[rank - 1], ordered[count - rank]) if rank else (-math.inf, math.inf)
    return Interval(statistics.median(ordered), low, high, confidence)


def bracketed_ratio(samples: Sequence[float], before: Sequence[float], after: Sequence[float]) -> Interval:
    """How many times the base's seconds, of samples that shared no round with it: it ran before them and after them.

    Over the mean of the base's two medians. The interval holds each of the three medians' own, all at once with 95 %
    (Bonferroni), so that what the device has drifted in between makes it wider. Under 7 values of one it is unbounded.

    Raises ValueError as `median_interval` does.
    """
    own, *bases = (median_interval(each, 1 - 0.05 / 3) for each in (samples, before, after))
    centre = own.median / statistics.mean(base.median for base in bases)
    if not all(math.isfinite(each.low) for each in (own, *bases)):
        return Interval(centre, -math.inf, math.inf)
    return Interval(centre, own.low / max(base.high for base in bases), own.high / min(base.low for base in bases))


def paired_ratio(samples: Sequence[float], base: Sequence[float]) -> Interval:
    """How many times the base's seconds, from samples taken in the same rounds.

    Raises ValueError when the two differ in number.
    """
    if len(samples) != len(base):
        raise ValueError(f"paired samples must be equally many, got {len(samples)} and {len(base)}")
    return median_interval([one / other for one, other in zip(samples, base, strict=True)])
