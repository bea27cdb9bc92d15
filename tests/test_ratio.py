"""Medians and ratios with distribution-free intervals."""

import math
import random

import pytest

from lora_bench.bench.ratio import median_interval, paired_ratio


def test_interval_is_that_of_the_sign_test() -> None:
    # Conover's table: for n = 20 the 6th and the 15th of the ordered values cover the median with 95.86 %.
    interval = median_interval([float(value) for value in range(1, 21)])

    assert (interval.median, interval.low, interval.high) == (10.5, 6, 15)


@pytest.mark.parametrize(("count", "bounded"), [(1, False), (5, False), (6, True)])
def test_too_few_values_bound_nothing(count: int, bounded: bool) -> None:
    interval = median_interval([1.0] * count)

    assert math.isfinite(interval.low) == math.isfinite(interval.high) == bounded


def test_interval_covers_the_median_as_often_as_it_says() -> None:
    draw = random.Random(1)
    covered = 0
    for _ in range(2000):
        interval = median_interval([draw.lognormvariate(0, 1) for _ in range(25)])
        covered += interval.low <= 1 <= interval.high

    # 95 % is promised and the discrete interval covers 95.7 %; 4 standard errors of 2000 trials are 1.8 %.
    assert 0.939 <= covered / 2000 <= 0.975


def test_a_ratio_is_paired_round_by_round() -> None:
    # The machine slows down tenfold half-way; the ratio does not see it, a ratio of the medians would.
    base = [1.0] * 10 + [10.0] * 11
    ratio = paired_ratio([1.5 * seconds for seconds in base], base)

    assert (ratio.low, ratio.median, ratio.high) == (1.5, 1.5, 1.5)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_values_that_are_no_times_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite values"):
        median_interval(values)


def test_unequal_numbers_of_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="equally many, got 2 and 1"):
        paired_ratio([1.0, 2.0], [1.0])
