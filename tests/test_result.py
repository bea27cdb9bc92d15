"""`Result`: figures from the rounds that count, and results read back from records."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lora_bench.bench.proof import Proof
from lora_bench.bench.result import Result, recorded
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


# --- recorded -------------------------------------------------------------------------------------------------------


def whole() -> Result:
    return Result(
        TWO,
        samples(*[2.0] * 12, interrupted=(3,)),
        samples(*[1.0] * 12, interrupted=(4,)),
        [str(ONE), str(TWO)],
        Proof(14, 0.5, 9.0),
        window={"throttle": {}},
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
    return [record(result.row, fields) for fields in (result.timed(), memory, energy)]


def test_a_result_survives_its_records() -> None:
    plan = {"quantity": "plan", "rows": []}

    assert recorded([plan, *records(whole())]) == {TWO: whole()}
    assert recorded([plan]) == {}


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
