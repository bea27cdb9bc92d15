"""Medians and ratios with distribution-free intervals."""

import math
import random

import pytest

from lora_bench.bench.ratio import bracketed_ratio, median_interval, paired_ratio


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


def test_a_bracketed_ratio_is_over_the_mean_of_the_two_runs_of_the_base() -> None:
    own, before, after = ([value + step / 1e6 for step in range(10)] for value in (3.0, 1.0, 2.0))
    ratio = bracketed_ratio(own, before, after)

    assert ratio.median == pytest.approx(2.0, rel=1e-5)
    # Of ten values the interval is all of them: the slowest base, and the fastest.
    assert (ratio.low, ratio.high) == (min(own) / max(after), max(own) / min(before))


def test_a_bracketed_ratio_holds_the_true_one_wherever_between_its_runs_the_base_was() -> None:
    draw = random.Random(2)

    def samples(level: float) -> list[float]:
        return [level * draw.lognormvariate(0, 0.05) for _ in range(21)]

    covered = {1.0: 0, 1.1: 0}
    for _ in range(500):
        ratio = bracketed_ratio(samples(1.5), samples(1.0), samples(1.1))
        for level in covered:
            covered[level] += ratio.low <= 1.5 / level <= ratio.high
    # 95 % is promised; 4 standard errors of 500 trials are 3.9 %.
    assert min(covered.values()) / 500 >= 0.95 - 0.039


def test_with_too_few_samples_a_bracketed_ratio_is_unbounded() -> None:
    enough, few = [1.0] * 7, [1.0] * 6

    assert bracketed_ratio(enough, enough, enough)[:3] == (1, 1, 1)
    for three in ((few, enough, enough), (enough, few, enough), (enough, enough, few)):
        assert bracketed_ratio(*three)[:3] == (1, -math.inf, math.inf)
