"""Sampling: in which order and how often steps run, and what is known of their noise."""

from __future__ import annotations

import itertools
import math
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from lora_bench.bench.arm import Step
from lora_bench.bench.sampling import (
    LEAST_ROUNDS,
    MOST_ROUNDS,
    MOST_WARM_UP_ROUNDS,
    WARM_UP_ROUNDS,
    Samples,
    interleave,
    is_steady,
    noise,
    percentiles,
    undisturbed,
)

NAMES = ("a", "b", "c")


class Turns:
    """Steps under a clock of their own: every call takes a second of the day, and reads what is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, names: Sequence[str] = NAMES) -> None:
        self.names = names
        self.journal: list[str] = []
        self.now = 1000.0
        self.preempted = 0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(resource, "getrusage", lambda _who: SimpleNamespace(ru_nivcsw=self.preempted))

    def step(self, name: str) -> Step:
        run, prepare, move = (
            lambda word=word: self.journal.append(f"{word} {name}") for word in ("run", "prepare", "move")
        )
        return Step(run, prepare, move)

    def take(self, readings: Iterable[float] = itertools.repeat(1.0), **keywords: Any) -> dict[str, Samples]:
        upcoming = iter(readings)

        def clock(run: Callable[[], object]) -> float:
            run()
            self.now += 1
            return next(upcoming)

        options: dict[str, Any] = {"budget_seconds": 0.0, "relocating": False} | keywords
        self.journal.clear()
        return interleave(
            {name: self.step(name) for name in self.names},
            clock,
            holding=lambda name: self.journal.append(f"hold {name}"),
            **options,
        )

    def rounds(self) -> list[list[str]]:
        """The names of those that ran, by round."""
        ran = [word[-1] for word in self.journal if word.startswith("run")]
        return [ran[start : start + len(self.names)] for start in range(0, len(ran), len(self.names))]


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Turns:
    return Turns(monkeypatch)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Turns:
    """One step, whose readings are then told in order."""
    return Turns(monkeypatch, ["a"])


# --- order ----------------------------------------------------------------------------------------------------------


def test_every_step_runs_once_a_round_held_and_prepared_and_in_changing_order(turns: Turns) -> None:
    turns.take()

    assert all(sorted(names) == list(NAMES) for names in turns.rounds())
    ran = [word[-1] for word in turns.journal[2::3]]
    assert turns.journal == [f"{word} {name}" for name in ran for word in ("hold", "prepare", "run")]
    assert len(set(map(tuple, turns.rounds()))) > 3


def test_the_order_is_the_same_in_every_run(turns: Turns) -> None:
    assert turns.take(itertools.count(1.0)) == turns.take(itertools.count(1.0))


def test_samples_are_in_order_with_their_turns_and_the_warm_up_is_not_among_them(turns: Turns) -> None:
    samples = turns.take(itertools.count(1.0))
    before = len(NAMES) * WARM_UP_ROUNDS

    taken = sorted(itertools.chain.from_iterable(each.seconds for each in samples.values()))
    assert taken == [before + number + 1.0 for number in range(len(NAMES) * LEAST_ROUNDS)]
    for number, names in enumerate(turns.rounds()[WARM_UP_ROUNDS:]):
        for turn, name in enumerate(names):
            assert samples[name].turns[number] == turn
            assert samples[name].seconds[number] == before + len(NAMES) * number + turn + 1.0


def test_a_sample_in_which_the_processor_was_taken_away_says_so(alone: Turns) -> None:
    def readings() -> Iterator[float]:
        for number in itertools.count():
            alone.preempted += 2 * (number % 3 == 0)
            yield 1.0

    (samples,) = alone.take(readings()).values()

    first = WARM_UP_ROUNDS
    assert samples.interrupted == [number % 3 == 0 for number in range(first, first + LEAST_ROUNDS)]


@pytest.mark.parametrize(("relocating", "moved"), [(True, 6), (False, 0)])
def test_every_step_changes_its_place_every_other_round_held_as_well(
    turns: Turns, relocating: bool, moved: int
) -> None:
    turns.take(relocating=relocating)

    assert [turns.journal.count(f"move {name}") for name in NAMES] == [moved] * len(NAMES)
    for number, word in enumerate(turns.journal):
        if word.startswith("move"):
            assert turns.journal[number - 1] == word.replace("move", "hold")
    rounds = itertools.groupby(word.split()[0] for word in turns.journal if not word.startswith(("hold", "prepare")))
    if moved:
        assert [(word, len(list(group))) for word, group in rounds] == [("move", 3), ("run", 6)] * 6


# --- how long -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("readings", "rounds"),
    [
        ([5.0, 5.0], 2),
        ([5.0, 6.0], 2),
        ([5.0, 4.0, 4.0], 3),
        ([5.0, 4.0, 3.0, 3.5], 4),
        ([5.0, 4.0, 5.0], 3),
        ([float(number) for number in range(100, 1, -1)], MOST_WARM_UP_ROUNDS),
    ],
)
def test_it_warms_up_until_a_round_is_no_longer_faster(alone: Turns, readings: list[float], rounds: int) -> None:
    alone.take(itertools.chain(readings, itertools.repeat(2.0)), budget_seconds=float(MOST_WARM_UP_ROUNDS))

    assert len(alone.rounds()) == rounds + LEAST_ROUNDS


@pytest.mark.parametrize(("budget", "rounds"), [(0.0, WARM_UP_ROUNDS), (3.0, 3), (5.0, 5), (99.0, MOST_WARM_UP_ROUNDS)])
def test_warming_up_takes_no_longer_than_all_was_to_take(alone: Turns, budget: float, rounds: int) -> None:
    samples = alone.take(map(float, range(1000, 1, -1)), budget_seconds=budget, steady=False)["a"]

    assert samples.seconds[0] == 1000.0 - rounds


@pytest.mark.parametrize(
    ("budget", "rounds"),
    [
        (0.0, LEAST_ROUNDS),
        (36.0, LEAST_ROUNDS + 1),  # a round takes 3 s, and the warm-up counts: 36 s are over after 13 rounds
        (60.0, 19),
        (math.inf, MOST_ROUNDS),
    ],
)
def test_rounds_go_on_until_the_time_is_over(turns: Turns, budget: float, rounds: int) -> None:
    samples = turns.take(budget_seconds=budget, steady=False)

    assert [len(each.seconds) for each in samples.values()] == [rounds] * len(NAMES)


def growing() -> Iterator[float]:
    """Readings whose noise never settles: each block of samples is wider than all before."""
    return (1.0 if number % 2 else 1.0 + number for number in itertools.count())


@pytest.mark.parametrize(
    ("readings", "rounds"),
    [
        (lambda: itertools.repeat(1.0), MOST_ROUNDS),
        # A clock so coarse that the quartiles are one reading.
        (lambda: itertools.cycle([1.0, 1.0, 1.0, 1.0, 2.0]), MOST_ROUNDS),
        (lambda: itertools.chain([1.0] * 2, itertools.cycle([1.0, 1.1, 1.2])), 64),
        # 32 samples that differ little, then others: known only when those are the most of two thirds of all.
        (lambda: itertools.chain([1.0] * 2, [1.0, 1.1] * 16, itertools.cycle([1.0, 3.0])), 104),
        (growing, MOST_ROUNDS),
    ],
    ids=["none", "unresolved", "steady", "later", "never"],
)
def test_it_ends_when_the_noise_is_known_but_not_before_64_rounds(
    alone: Turns, readings: Callable[[], Iterator[float]], rounds: int
) -> None:
    (samples,) = alone.take(readings(), budget_seconds=math.inf).values()

    assert len(samples.seconds) == rounds


def test_the_noise_of_every_step_must_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    turns, numbers = Turns(monkeypatch, ["a", "b"]), itertools.count()
    unsteady = growing()

    def readings() -> Iterator[float]:
        while True:
            yield next(unsteady) if turns.journal[-1] == "run b" else 1.0 + next(numbers) % 3 / 100

    samples = turns.take(readings(), budget_seconds=math.inf)
    assert {len(each.seconds) for each in samples.values()} == {MOST_ROUNDS}


@pytest.mark.parametrize("reading", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("good", [0, 20])
def test_a_reading_that_is_no_time_is_an_error_with_its_step_in_hand(turns: Turns, reading: float, good: int) -> None:
    with pytest.raises(ValueError, match=rf"^a step takes more than 0 s and ends, got {reading:g} s by its clock$"):
        turns.take(itertools.chain([1.0] * good, [reading]))
    held, ran = turns.journal[-3], turns.journal[-1]
    assert held == ran.replace("run", "hold")


# --- what is known --------------------------------------------------------------------------------------------------


def test_noise_is_the_interquartile_range_as_a_share_of_the_median() -> None:
    assert noise([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == (6.0 - 2.0) / 4.0
    assert noise([3.0] * 9) == 0.0


@pytest.mark.parametrize(("last", "steady"), [(1.34, False), (1.36, True), (1.5, True), (1.64, True), (1.66, False)])
def test_noise_is_steady_if_two_thirds_of_the_samples_tell_it_within_a_tenth(last: float, steady: bool) -> None:
    # Quartiles of 1 and 2 throughout, around a median of 1.5 and then of `last`.
    assert is_steady([1.0, 2.0] * 6 + [last] * 6) == steady


def sampled(interrupted: Sequence[int], rounds: int = 12) -> Samples:
    return Samples([1.0] * rounds, [0] * rounds, [number in interrupted for number in range(rounds)])


@pytest.mark.parametrize(
    ("interrupted", "left"),
    [
        ([[]], range(12)),
        ([[3]], [number for number in range(12) if number != 3]),
        ([[3], [5]], [number for number in range(12) if number not in (3, 5)]),
        ([[3], [5], [7]], range(12)),  # 9 are too few
        ([range(12)], range(12)),
    ],
)
def test_rounds_in_which_any_step_was_interrupted_are_left_out_if_enough_remain(
    interrupted: list[Sequence[int]], left: Sequence[int]
) -> None:
    assert undisturbed([sampled(numbers) for numbers in interrupted]) == list(left)


@pytest.mark.parametrize(
    ("count", "names"),
    [(1, {"p50"}), (63, {"p50"}), (64, {"p50", "p90"}), (661, {"p50", "p90"}), (662, {"p50", "p90", "p99"})],
)
def test_a_percentile_is_told_only_from_enough_samples(count: int, names: set[str]) -> None:
    assert percentiles([1.0] * count) == dict.fromkeys(names, 1.0)


def test_percentiles_lie_between_order_statistics() -> None:
    assert percentiles([float(number) for number in range(1000, -1, -1)]) == {"p50": 500.0, "p90": 900.0, "p99": 990.0}
