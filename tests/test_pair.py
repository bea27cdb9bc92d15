"""A pair of processes: what counts of it is decided without a look at its times."""

import json
import math

import numpy as np
import pytest

from lora_bench.gate.pair import LOCATION, TAIL, Pair
from tests.made_pairs import ROUNDS, calm, made


def test_the_ratio_is_of_percentiles() -> None:
    base = [1.0 + number / 100 for number in range(ROUNDS)]
    head = [2 * value for value in base]

    pair = Pair(base, head, [3 * value for value in base], calm())

    assert math.isclose(pair.log_ratio(LOCATION), math.log(2))
    assert math.isclose(pair.log_ratio(TAIL, "control"), math.log(3))


@pytest.mark.parametrize("side", ["base", "control"])
def test_interrupted_rounds_do_not_count(side: str) -> None:
    head = [1.0] * ROUNDS
    head[:10] = [0.1] * 10  # quicker, and still dropped: only the interruption is looked at
    marks = calm() | {side: [number < 10 for number in range(ROUNDS)]}

    pair = Pair([1.0] * ROUNDS, head, [1.0] * ROUNDS, marks)

    assert pair.rounds == list(range(10, ROUNDS))
    assert pair.log_ratio(LOCATION) == 0
    assert not pair.restless


def test_a_head_that_interrupts_itself_is_not_spared_it() -> None:
    slow = [number % 5 == 0 for number in range(ROUNDS)]
    head = [2.0 if each else 1.0 for each in slow]

    pair = Pair([1.0] * ROUNDS, head, [1.0] * ROUNDS, calm() | {"head": slow})

    assert pair.rounds == list(range(ROUNDS))
    assert pair.log_ratio(TAIL) == math.log(2)


def test_where_most_are_interrupted_it_is_restless_and_all_count() -> None:
    pair = made(interrupted=ROUNDS // 2 + 1)

    assert pair.restless
    assert pair.rounds == list(range(ROUNDS))


def test_the_times_do_not_decide_what_counts() -> None:
    slow = made(head=50.0, tail=100.0)

    assert not slow.restless
    assert slow.rounds == made().rounds


@pytest.mark.parametrize(("rounds", "told"), [(20, False), (63, False), (64, True)])
def test_a_tail_takes_64_rounds(rounds: int, told: bool) -> None:
    ones = [1.0] * rounds

    assert Pair(ones, ones, ones, calm(rounds)).tells_tail == told


def test_it_survives_json() -> None:
    pair = made(head=1.1, interrupted=3, throttled=True)

    assert Pair(**json.loads(json.dumps(pair.as_dict()))) == pair


@pytest.mark.parametrize("odd", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("side", ["base", "head", "control"])
def test_seconds_that_are_none_are_refused(side: str, odd: float) -> None:
    sides = {name: [1.0] * ROUNDS for name in ("base", "head", "control")}
    sides[side][5] = odd

    with pytest.raises(ValueError, match=f"above 0 and finite, got .* of {side}"):
        Pair(sides["base"], sides["head"], sides["control"], calm())


@pytest.mark.parametrize("lengths", [(64, 63, 64, 64), (64, 64, 64, 0), (19, 19, 19, 19)])
def test_unequal_or_too_few_rounds_are_refused(lengths: tuple[int, ...]) -> None:
    base, head, control = (np.ones(length).tolist() for length in lengths[:3])

    with pytest.raises(ValueError, match="at least 20 rounds"):
        Pair(base, head, control, calm(lengths[3]))
