"""The smallest change that a runner can show, from the scatter between equals."""

import math

import numpy as np
import pytest

from lora_bench.gate.power import noise_floor, smallest_change
from lora_bench.gate.verdict import FAIL, INCONCLUSIVE, LOOKS, PASS, Limits, shown, shown_equal

LOCATION = Limits().location


def scatter(spread: float) -> list[float]:
    return [float(value) for value in np.random.default_rng(1).normal(0, spread, 20)]


def test_without_noise_it_is_the_margin_itself() -> None:
    change = smallest_change([0.0] * 7, LOCATION)

    assert LOCATION.fail < change <= LOCATION.fail + 0.001


def test_more_noise_hides_more() -> None:
    changes = [smallest_change(scatter(spread), LOCATION) for spread in (0.001, 0.005, 0.01)]

    assert changes == sorted(changes)
    assert len(set(changes)) == 3


def test_what_equals_differ_by_on_average_is_no_noise() -> None:
    shifted = [value + 0.1 for value in scatter(0.01)]

    assert math.isclose(smallest_change(shifted, LOCATION), smallest_change(scatter(0.01), LOCATION), abs_tol=0.002)


def test_the_gate_finds_what_it_says_it_finds() -> None:
    spread, draw = 0.01, np.random.default_rng(5)
    change = smallest_change(draw.normal(0, spread, 50).tolist(), LOCATION)

    def attempt() -> bool:
        """The rule of `Attempt`, on nothing but log-ratios."""
        head, control = draw.normal(math.log1p(change), spread, LOOKS[-1]), draw.normal(0, spread, LOOKS[-1])
        for look in LOOKS:
            verdict = shown(head[:look].tolist(), LOCATION)
            if shown_equal(control[:look].tolist(), LOCATION) == PASS and verdict != INCONCLUSIVE:
                return verdict == FAIL
        return False

    found = [attempt() and attempt() for _ in range(150)]

    assert LOCATION.fail < change < math.inf
    assert np.mean(found) > 0.8


@pytest.mark.parametrize("spread", [0.05, 5.0])
def test_where_equals_differ_too_much_nothing_is_found(spread: float) -> None:
    """However large the change: base beside itself says that nothing can be told."""
    assert smallest_change(scatter(spread), LOCATION) == math.inf


def test_few_pairs_tell_no_scatter() -> None:
    with pytest.raises(ValueError, match="scatter is told by 7 pairs or more, got 6"):
        smallest_change([0.0] * 6, LOCATION)


@pytest.mark.parametrize("shift", [0.0, 0.02, -0.02])
def test_the_noise_floor_holds_a_lasting_difference_too(shift: float) -> None:
    floor = noise_floor([value + shift for value in scatter(0.001)])

    assert abs(shift) <= floor < abs(shift) + 0.003
