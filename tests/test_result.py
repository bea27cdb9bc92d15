"""`Result`: figures from the rounds that count, and results read back from records."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest

from lora_bench.bench.result import Proof, Result, recorded
from lora_bench.bench.sampling import Samples
from lora_bench.bench.workload import Row
from tests.micro_rows import row

ONE, TWO = row("one", "separate", "prefill"), row("two", "batched", "decode", adapters=8, popularity="zipf")


def samples(*seconds: float, interrupted: tuple[int, ...] = ()) -> Samples:
    rounds = range(len(seconds))
    return Samples(list(seconds), list(rounds), [number in interrupted for number in rounds])


def test_figures_come_from_the_samples() -> None:
    result = Result(ONE, samples(4.0, 1.0, 2.0, 3.0, 5.0, 6.0, 7.0), samples(2.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0))

    assert (result.latency.median, result.latency.low, result.latency.high) == (4.0, 1.0, 7.0)
    assert result.ratio is not None
    assert result.ratio.median == 3.0
    assert result.tokens_per_second == 12 / 4.0


def test_a_row_without_a_base_has_no_ratio() -> None:
    alone = Result(ONE, samples(1.0, 2.0, 3.0))

    assert alone.ratio is None
    assert alone.latency.median == 2.0


def test_rounds_in_which_the_row_or_its_base_was_interrupted_do_not_count() -> None:
    own = samples(*[1.0] * 10, 100.0, 100.0, 1.0, interrupted=(10,))
    base = samples(*[0.5] * 10, 0.5, 0.5, 900.0, interrupted=(11, 12))
    result = Result(ONE, own, base)

    assert result.rounds == list(range(10))
    assert result.seconds == [1.0] * 10
    assert result.ratio is not None
    assert (result.ratio.low, result.ratio.high) == (2.0, 2.0)
    assert Result(ONE, own).rounds == [*range(10), 11, 12]


def test_what_is_nearly_always_interrupted_counts_whole() -> None:
    result = Result(ONE, samples(*[1.0] * 9, 3.0, 3.0, interrupted=(9, 10)))

    assert result.seconds == [1.0] * 9 + [3.0] * 2


@pytest.mark.parametrize(
    ("result", "measured", "pending"),
    [
        (Result(ONE), False, True),
        (Result(ONE, samples(1.0)), True, False),
        (Result(ONE, failure="oom: full"), False, False),
    ],
)
def test_a_row_is_pending_until_it_has_times_or_has_failed(result: Result, measured: bool, pending: bool) -> None:
    assert (result.measured, result.pending) == (measured, pending)


def bracketed(own: Samples, base: Samples) -> Result:
    return Result(ONE, own._replace(turns=[1] * len(own.seconds)), base, interleaved=False)


def around(before: Samples, after: Samples) -> Samples:
    turns = [0] * len(before.seconds) + [2] * len(after.seconds)
    return Samples(before.seconds + after.seconds, turns, before.interrupted + after.interrupted)


def test_between_two_runs_of_its_base_a_row_s_own_rounds_count_and_theirs_apart() -> None:
    own = samples(*[3.0] * 10, 99.0, interrupted=(10,))
    base = around(samples(*[1.0] * 12, 77.0, interrupted=(12,)), samples(55.0, *[2.0] * 10, interrupted=(0,)))
    result = bracketed(own, base)

    assert result.rounds == list(range(10))
    assert result.ratio is not None
    assert result.ratio[:3] == (2.0, 1.5, 3.0)


def test_a_run_of_the_base_that_was_nearly_always_interrupted_counts_whole() -> None:
    result = bracketed(samples(*[3.0] * 10), around(samples(*[1.0] * 9, 3.0, interrupted=(9,)), samples(*[1.0] * 10)))

    assert result.ratio is not None
    assert result.ratio.low == 1.0


# --- recorded -------------------------------------------------------------------------------------------------------


def whole() -> Result:
    return Result(
        TWO,
        samples(*[2.0] * 12, interrupted=(3,)),
        samples(*[1.0] * 12, interrupted=(4,)),
        [str(ONE), str(TWO)],
        Proof(14, 0.5, 9.0),
        window={"throttle": {}},
        parts={"load": [0.5] * 12, "evict": [1.5] * 12},
        launches={"launch_share": 0.25},
        memory={"parameter_bytes": 7},
        energy={"joules": 3.0},
    )


def record(of: Row, fields: dict[str, Any]) -> dict[str, Any]:
    there = {"subject": of.subject, "workload": of.workload.as_dict()} | fields
    back: dict[str, Any] = json.loads(json.dumps(there))
    return back


def records(result: Result) -> list[dict[str, Any]]:
    memory = {"quantity": "memory", "memory": result.memory}
    energy = {"quantity": "energy", "energy": result.energy}
    launches = {"quantity": "launches", "launches": result.launches}
    return [record(result.row, fields) for fields in (result.timed(), memory, energy, launches)]


def test_a_result_survives_its_records() -> None:
    plan = {"quantity": "plan", "rows": []}

    assert recorded([plan, *records(whole())]) == {TWO: whole()}
    assert recorded([plan]) == {}


def test_so_does_one_whose_base_ran_around_it() -> None:
    result = bracketed(samples(*[3.0] * 10), around(samples(*[1.0] * 10), samples(*[2.0] * 11)))

    assert recorded([record(ONE, result.timed())]) == {ONE: result}
    # What was written before there were such is interleaved.
    assert recorded([record(ONE, {k: v for k, v in whole().timed().items() if k != "interleaved"})])[ONE].interleaved


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"base_order": [0] * 21}, f"{ONE}: a base around it must have the turns 0 and 2, got [0, 0, 0"),
        ({"interleaved": True}, f"{ONE}: it and its base must have equally many samples, got 10 and 21"),
        ({"interleaved": "no"}, "interleaved must be true or false, got 'no'"),
        ({"interleaved": 1}, "interleaved must be true or false, got 1"),
    ],
)
def test_what_no_bracket_can_be_is_refused(fields: dict[str, Any], why: str) -> None:
    result = bracketed(samples(*[3.0] * 10), around(samples(*[1.0] * 10), samples(*[2.0] * 11)))

    with pytest.raises(ValueError, match=re.escape(why)):
        recorded([record(ONE, result.timed() | fields)])


@pytest.mark.parametrize("kind", ["wrong", "oom", "crashed", "timeout", "error"])
def test_so_does_a_failure(kind: str) -> None:
    failed = Result(ONE, kind=kind, failure=f"{kind}: why")

    assert recorded([record(ONE, failed.failed())]) == {ONE: failed}


def test_a_row_whose_gpu_was_lost_is_still_to_be_measured() -> None:
    lost = Result(ONE, kind="gpu_lost", failure="gpu_lost: fell off")

    assert recorded([record(ONE, lost.failed())])[ONE].pending


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (0, {"order": None}, "a latency record lacks or has too much: 'order'"),
        (0, {"subject": None}, "a latency record lacks or has too much: 'subject'"),
        (0, {"correctness": {"tests": 1}}, "a latency record lacks or has too much: .*unexpected.*'tests'"),
        (1, {"memory": None}, "a memory record lacks or has too much: 'memory'"),
        (1, {"workload": {"setup": "base"}}, "a memory record lacks or has too much: .*missing.*'phase'"),
        (1, {"workload": TWO.workload.as_dict() | {"rank": 0}}, "rank must be at least 1, got 0"),
    ],
)
def test_a_record_that_is_none_is_named(number: int, change: dict[str, Any], message: str) -> None:
    broken = records(whole())[number] | change
    broken = {name: value for name, value in broken.items() if value is not None}

    with pytest.raises(ValueError, match=message):
        recorded([broken])


@pytest.mark.parametrize("of", ["", "base_"])
@pytest.mark.parametrize("seconds", [math.nan, 0.0, -1.0, math.inf, 10**400, "1.0", True, None])
def test_a_sample_that_no_clock_can_have_read_is_named_with_its_row(of: str, seconds: Any) -> None:
    broken = records(whole())[0]
    broken[f"{of}samples_seconds"][5] = seconds

    with pytest.raises(ValueError, match=re.escape(f"{TWO}: {of}samples_seconds[5] must be above 0 s")) as error:
        recorded([json.loads(json.dumps(broken))])
    assert str(error.value).endswith(f"finite, got {seconds!r}")


@pytest.mark.parametrize("name", ["samples_seconds", "order", "interrupted", "base_order", "base_interrupted"])
def test_samples_without_their_turn_or_interruption_are_refused(name: str) -> None:
    broken = records(whole())[0]
    broken[name].pop()

    with pytest.raises(ValueError, match=re.escape(f"{TWO}: the samples must all have")) as error:
        recorded([broken])
    assert f"11 {name}" in str(error.value)


def test_parts_are_those_of_every_sample_or_none() -> None:
    of_parts, without = records(whole())[0], records(whole())[0]
    del without["parts_seconds"]
    assert recorded([without])[TWO].parts == {}

    of_parts["parts_seconds"]["load"].pop()
    with pytest.raises(ValueError, match=re.escape(f"{TWO}: every sample must have its part 'load', got 11 of 12")):
        recorded([of_parts])


def test_turns_that_were_not_noted_are_none() -> None:
    old = records(whole())[0] | {"order": [], "base_order": []}

    assert recorded([old])[TWO].samples.turns == []


def test_a_row_and_its_base_have_equally_many_samples_or_the_base_none_and_the_row_some() -> None:
    result = whole()
    result.base = samples(*[1.0] * 11)
    with pytest.raises(ValueError, match=r"must have equally many samples, got 12 and 11$"):
        recorded(records(result))
    result.base = samples()
    assert recorded(records(result)) == {TWO: result}
    result.samples = samples()
    with pytest.raises(ValueError, match=r"a latency needs samples, got none$"):
        recorded(records(result))


def test_launches_without_their_samples_are_refused() -> None:
    result = whole()
    result.launches = {"cold_seconds": []}

    with pytest.raises(ValueError, match=r"launches must have samples, got none of cold_seconds$"):
        recorded(records(result))
