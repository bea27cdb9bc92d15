"""Verdicts of known changes, and when a comparison is over."""

from typing import Any

import pytest

from lora_bench.gate.pair import Pair
from lora_bench.gate.verdict import (
    FAIL,
    INCONCLUSIVE,
    LOOKS,
    MOST_FAIL,
    PASS,
    REPLACED,
    UNTIL_CALM,
    Comparison,
    Limits,
    judge,
    told,
)
from tests.made_pairs import ROUNDS, calm, made


def settle(*changes: dict[str, Any], noise: float = 0.001) -> Comparison:
    """The comparison of pairs that are made with these changes in turn, until it wants no more."""
    comparison = Comparison()
    number = 0
    while not comparison.settled:
        comparison.add(made(**changes[number % len(changes)], seed=number, noise=noise))
        number += 1
    return comparison


def counts(comparison: Comparison) -> list[int]:
    return [len(attempt.pairs) for attempt in comparison.attempts]


def test_equals_pass_at_the_first_look() -> None:
    comparison = settle({})

    assert comparison.verdict == PASS
    assert counts(comparison) == [7]
    assert "no change that matters" in comparison.because


@pytest.mark.parametrize("head", [1.03, 1.05, 1.5])
def test_slower_fails_twice(head: float) -> None:
    comparison = settle({"head": head})

    assert comparison.verdict == FAIL
    assert counts(comparison) == [7, 7]
    change = comparison.last.location.change
    assert change.low < head - 1 < change.high


@pytest.mark.parametrize("head", [0.97, 0.5])
def test_faster_is_never_a_regression(head: float) -> None:
    comparison = settle({"head": head})

    assert comparison.verdict == PASS
    assert comparison.because == "faster"


def test_a_change_too_small_to_matter_passes_however_sure() -> None:
    comparison = settle({"head": 1.005}, noise=1e-6)

    assert comparison.verdict == PASS
    assert comparison.last.location.change.low > 0


def test_a_tail_alone_fails() -> None:
    comparison = settle({"tail": 1.3})

    assert comparison.verdict == FAIL
    assert comparison.last.location.verdict == PASS
    assert "slower at its worst" in comparison.because


def test_a_tail_is_not_judged_on_few_rounds() -> None:
    comparison = Comparison()
    for pair in (made(tail=1.3, seed=number) for number in range(LOOKS[0])):
        comparison.add(Pair(pair.base[:30], pair.head[:30], pair.control[:30], calm(30)))

    assert comparison.last.tail is None
    assert comparison.verdict == PASS
    assert "the worst steps not judged" in comparison.because


def test_one_short_pair_does_not_hide_the_tail_of_the_others() -> None:
    comparison = Comparison()
    short = made(tail=1.3)
    comparison.add(Pair(short.base[:30], short.head[:30], short.control[:30], calm(30)))
    number = 1
    while not comparison.settled:
        comparison.add(made(tail=1.3, seed=number))
        number += 1

    assert comparison.verdict == FAIL
    assert counts(comparison)[0] == LOOKS[1]  # six that tell are too few


@pytest.mark.parametrize("control", [1.05, 0.95])
def test_where_base_differs_from_itself_nothing_is_told(control: float) -> None:
    comparison = settle({"head": 1.5, "control": control})

    assert comparison.verdict == INCONCLUSIVE
    assert counts(comparison) == [LOOKS[-1]]
    assert "base against itself" in comparison.because


def test_what_scatters_too_much_is_inconclusive() -> None:
    comparison = settle({"head": 0.9}, {"head": 1.1})

    assert comparison.verdict == INCONCLUSIVE
    assert counts(comparison) == [LOOKS[-1]]
    assert "neither shown" in comparison.because


def test_a_failure_that_does_not_come_again_is_inconclusive() -> None:
    comparison = Comparison()
    for number in range(2 * LOOKS[0]):
        comparison.add(made(head=1.1 if number < LOOKS[0] else 1.0, seed=number))

    assert comparison.settled
    assert [attempt.verdict for attempt in comparison.attempts] == [FAIL, PASS]
    assert comparison.verdict == INCONCLUSIVE
    assert "not again" in comparison.because


def test_one_failure_is_not_yet_a_verdict() -> None:
    comparison = Comparison()
    for number in range(LOOKS[0]):
        comparison.add(made(head=1.1, seed=number))

    assert not comparison.settled
    assert comparison.verdict == INCONCLUSIVE
    assert "before that was measured again" in comparison.because


def test_too_few_pairs_tell_nothing() -> None:
    comparison = Comparison()
    assert (comparison.verdict, comparison.because) == (INCONCLUSIVE, "no pair was measured")
    for number in range(LOOKS[0] - 1):
        comparison.add(made(head=1.5, seed=number))

    assert not comparison.settled
    assert comparison.verdict == INCONCLUSIVE
    assert "it ended after 6 pairs" in comparison.because


def test_where_too_many_are_throttled_nothing_is_told() -> None:
    comparison = Comparison()
    for number in range(REPLACED + 1):
        assert not comparison.settled or number == 0
        comparison.add(made(head=2.0, seed=number, throttled=True))

    assert comparison.settled
    assert comparison.last.pairs == []
    assert (comparison.verdict, comparison.because) == (INCONCLUSIVE, "8 pairs were throttled")


def test_interrupted_pairs_are_replaced() -> None:
    comparison = Comparison()
    comparison.add(made())
    for number in range(REPLACED):
        comparison.add(made(head=2.0, seed=number, interrupted=ROUNDS))
    assert (len(comparison.last.quarantined), len(comparison.last.pairs)) == (REPLACED, 1)

    comparison.add(made(seed=1, interrupted=ROUNDS))
    assert (len(comparison.last.quarantined), len(comparison.last.pairs)) == (REPLACED, 2)


def test_where_interruptions_are_the_rule_such_pairs_count() -> None:
    comparison = Comparison()
    for number in range(UNTIL_CALM):
        comparison.add(made(head=2.0, seed=number, interrupted=ROUNDS))
    assert (len(comparison.last.quarantined), comparison.last.pairs) == (UNTIL_CALM, [])

    for number in range(LOOKS[0]):
        comparison.add(made(seed=number, interrupted=ROUNDS))

    assert len(comparison.last.pairs) == LOOKS[0]
    assert comparison.verdict == PASS


def test_between_the_looks_it_goes_on() -> None:
    comparison = Comparison()
    for number in range(LOOKS[0] + 1):
        comparison.add(made(head=(0.9, 1.1)[number % 2], seed=number))
    for number in range(LOOKS[1] - LOOKS[0] - 2):
        comparison.add(made(seed=number))

    assert not comparison.settled


def test_a_change_is_told_with_its_interval_if_there_is_one() -> None:
    assert told(judge([0.0] * 7, Limits().location).change) == "+0.0 % [+0.0, +0.0]"
    assert told(judge([0.0] * 5, Limits().location).change) == "+0.0 % [unbounded]"


def test_margins_move_up_by_what_equals_differ_by() -> None:
    own, noisy = Limits(), Limits().over(0.02, 0.001)

    assert noisy.location.fail == 0.02
    assert noisy.location.accept - own.location.accept == pytest.approx(0.01)
    assert noisy.tail == own.tail  # less noise than the margin is no reason to move it
    assert Limits().over(9.0, 9.0).location.fail == MOST_FAIL
    assert Limits.of(noisy.as_dict()) == noisy
    assert judge([0.018] * 7, own.location).verdict == FAIL
    assert judge([0.018] * 7, noisy.location).verdict == PASS
