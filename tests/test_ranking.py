"""Subjects of one workload beside each other: places, ties, and what is no comparison."""

from __future__ import annotations

from typing import Any

import pytest

from lora_bench.bench.ratio import median_interval
from lora_bench.bench.result import Proof, Result
from lora_bench.bench.sampling import Samples
from lora_bench.report.ranking import ALONE, correctness, rankings
from tests.micro_rows import row

NOISE = [1.0, 1.03, 0.98, 1.01, 1.07, 0.95, 1.02, 0.99, 1.04, 0.97, 1.0, 1.05]
SWING = [1.02 if number % 2 else 0.98 for number in range(len(NOISE))]


def samples(seconds: list[float]) -> Samples:
    return Samples(seconds, list(range(len(seconds))), [False] * len(seconds))


def result(
    subject: str, times: float, swing: list[float] | None = None, phase: str = "decode", **changes: Any
) -> Result:
    """One that takes `times` the base's seconds in every round, or more or less by `swing`."""
    own = [times * each * by for each, by in zip(NOISE, swing or [1.0] * len(NOISE), strict=True)]
    return Result(row(subject, "separate", phase, **changes), samples(own), samples(NOISE))


def places(*results: Result) -> list[tuple[str, str]]:
    (ranking,) = rankings(results)
    return [(place.subject, str(place)) for place in ranking.places]


def test_the_faster_has_the_first_place_however_noisy_the_rounds() -> None:
    assert places(result("slow", 1.01), result("fast", 1.0)) == [("fast", "1"), ("slow", "2")]


def test_those_between_which_no_difference_is_shown_tie() -> None:
    equals = result("one", 1.0), result("two", 1.0, SWING)

    assert sorted(places(*equals)) == [("one", "1 ="), ("two", "1 =")]
    assert sorted(places(*equals, result("three", 1.5))) == [("one", "1 ="), ("three", "3"), ("two", "1 =")]


def test_a_place_is_held_against_its_own_fastest() -> None:
    # The second ties with the first and the third with the second, but the third not with the first.
    ordered = [result("one", 1.0), result("two", 1.01, SWING), result("three", 1.025)]

    assert places(*ordered) == [("one", "1 ="), ("two", "1 ="), ("three", "3")]
    assert places(*ordered[1:]) == [("two", "1 ="), ("three", "1 =")]


def test_the_ratio_to_the_fastest_is_of_the_same_rounds() -> None:
    (ranking,) = rankings([result("slow", 1.25), result("fast", 1.0)])

    first, second = (place.against for place in ranking.places)
    assert first is not None
    assert second is not None
    assert first[:3] == (1, 1, 1)
    assert second[:3] == pytest.approx((1.25, 1.25, 1.25))


def test_too_few_rounds_show_no_difference() -> None:
    few = [result("one", 1.0), result("two", 3.0)]
    for each in few:
        each.samples, each.base = (samples(own.seconds[:5]) for own in (each.samples, each.base))

    assert places(*few) == [("one", "1 ="), ("two", "1 =")]


def test_a_round_in_which_one_was_interrupted_counts_for_nobody() -> None:
    slow, fast = result("slow", 1.01), result("fast", 1.0)
    fast.samples.interrupted[4] = True
    fast.samples.seconds[4] = 9e9
    (ranking,) = rankings([slow, fast])
    left = [seconds for number, seconds in enumerate(NOISE) if number != 4]

    assert [place.latency for place in ranking.places] == [
        median_interval(left),
        median_interval([1.01 * seconds for seconds in left]),
    ]


def test_what_was_timed_in_other_rounds_has_no_place() -> None:
    other = result("other", 0.1)
    other.base = samples([each * 1.001 for each in NOISE])

    assert places(result("one", 1.0), other, result("two", 1.1)) == [("one", "1"), ("two", "2"), ("other", ALONE)]


def test_those_without_a_base_did_not_take_turns() -> None:
    one, two = result("one", 1.0), result("two", 1.1)
    one.base = two.base = samples([])

    assert places(one, two) == [("one", ALONE), ("two", ALONE)]
    assert places(one, two, result("three", 2.0), result("four", 3.0))[:2] == [("three", "1"), ("four", "2")]


def test_those_without_times_come_last_and_say_why() -> None:
    wrong = Result(row("bad", "separate", "decode"), kind="wrong", failure="layer 3")
    pending = Result(row("late", "separate", "decode"))
    (ranking,) = rankings([wrong, pending, result("one", 1.0)])

    assert [str(place) for place in ranking.places] == ["1", "wrong", "not measured"]


def test_only_what_has_the_same_workload_is_compared() -> None:
    several = [result("one", 1.0), result("two", 1.1, phase="prefill"), result("two", 1.2, rank=8)]

    assert rankings(several) == []
    both = rankings([*several, result("two", 1.3), result("one", 1.0, phase="prefill")])
    assert [each.title for each in both] == ["prefill, separate r4", "decode, separate r4"]


def test_nothing_is_ranked_where_nobody_was_measured() -> None:
    assert rankings([Result(row(name, "separate", "decode"), kind="oom") for name in ("one", "two")]) == []


@pytest.mark.parametrize(
    ("proof", "kind", "said"),
    [(Proof(3, 0.123456, 7.0), "", "0.12 of the bound"), (None, "", "not proven"), (None, "wrong", "wrong")],
)
def test_correctness_stands_beside_the_speed(proof: Proof | None, kind: str, said: str) -> None:
    assert correctness(Result(row("one", "separate", "decode"), proof=proof, kind=kind)) == said
