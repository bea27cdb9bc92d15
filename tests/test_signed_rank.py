"""The exact signed-rank test, against all choices of signs counted one by one and against scipy."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_bench.gate.signed_rank import MOST, centre, p_above, p_below

WHOLE = st.lists(st.integers(-6, 6), min_size=1, max_size=8)


def counted(values: list[int], limit: int) -> float:
    """The p-value by its definition: the share of sign choices with as large a sum of positive ranks."""
    distances = [value - limit for value in values]
    sizes = [abs(distance) for distance in distances]
    ranks = [sum(other < size for other in sizes) + (1 + sizes.count(size)) / 2 for size in sizes]
    seen = sum(rank for rank, distance in zip(ranks, distances, strict=True) if distance > 0)
    sums = [
        sum(rank for rank, sign in zip(ranks, signs, strict=True) if sign)
        for signs in itertools.product((False, True), repeat=len(values))
    ]
    return sum(each >= seen for each in sums) / len(sums)


@given(WHOLE, st.integers(-3, 3))
def test_it_counts_every_choice_of_signs(values: list[int], limit: int) -> None:
    assert p_above(values, limit) == counted(values, limit)


@given(WHOLE, st.integers(-3, 3))
def test_below_is_above_seen_in_a_mirror(values: list[int], limit: int) -> None:
    assert p_below(values, limit) == counted([-value for value in values], -limit)


def test_seven_alike_are_one_in_128() -> None:
    assert p_above([1, 2, 3, 4, 5, 6, 7], 0) == 1 / 128
    assert p_below([1, 2, 3, 4, 5, 6, 7], 0) == 1


def test_values_at_the_limit_count_against() -> None:
    assert p_above([0.0] * 14, 0.0) == 1
    assert p_below([0.0] * 14, 0.0) == 1


def test_it_agrees_with_scipy() -> None:
    wilcoxon = pytest.importorskip("scipy.stats", reason="scipy is not installed").wilcoxon
    for seed in range(5):
        values = np.random.default_rng(seed).normal(0.4, 1, size=14).tolist()

        theirs = wilcoxon(values, alternative="greater", method="exact").pvalue
        assert math.isclose(p_above(values, 0.0), theirs, rel_tol=1e-12)


def test_the_interval_is_what_the_test_would_not_reject() -> None:
    values = np.random.default_rng(3).normal(0, 1, size=14).tolist()

    estimate = centre(values, confidence=0.95)

    edge = 1e-9
    for end, outside, p in ((estimate.low, -edge, p_above), (estimate.high, edge, p_below)):
        assert p(values, end - outside) > 0.025
        assert p(values, end + outside) <= 0.025
    assert estimate.low < estimate.median < estimate.high


@pytest.mark.parametrize(("count", "bounded"), [(5, False), (6, True), (7, True)])
def test_under_six_values_the_interval_is_unbounded(count: int, bounded: bool) -> None:
    estimate = centre([float(value) for value in range(count)])

    assert math.isfinite(estimate.low) == math.isfinite(estimate.high) == bounded


def test_it_covers_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    sets = draw.standard_t(2, size=(2000, 10))

    covered = np.mean([low <= 0 <= high for _, low, high, _ in map(centre, sets.tolist())])

    assert covered >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / len(sets))


@pytest.mark.parametrize("values", [[], [1.0] * (MOST + 1), [1.0, math.nan], [math.inf]])
def test_nonsense_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="signed-rank"):
        p_above(values, 0.0)
    with pytest.raises(ValueError, match="signed-rank"):
        centre(values)
