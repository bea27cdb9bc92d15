"""One run: which rows are measured together, what is kept of what the workers say, and what is written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lora_bench.bench import measure
from lora_bench.bench import session as sessions
from lora_bench.bench.isolate import Failure
from lora_bench.bench.measure import Progress, Refusal, Timing
from lora_bench.bench.proof import Proof
from lora_bench.bench.records import Records
from lora_bench.bench.session import Result, Session
from lora_bench.bench.workload import Row, Workload

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

FINGERPRINT = {"hard": {"device_name": "A"}, "soft": {}}
PROOF = Proof(14, 0.5, 9.0)


def row(subject: str, setup: str, phase: str = "decode") -> Row:
    return Row(subject, Workload(setup, phase, "micro", "fp32", rank=4, batch=2, sequence=6))


ONE, TWO, BASE = row("one", "separate"), row("two", "separate"), row("one", "separate").base()
ROUNDS = 7


def timing(of: Row, seconds: float, base_seconds: float = 0.5) -> Timing:
    base = [base_seconds] * ROUNDS
    return Timing(of, [seconds] * ROUNDS, base, None if of.subject == "base" else PROOF, [str(of), str(of.base())])


class Workers:
    """What the worker processes say, in the place of `stream`; and what they were asked."""

    def __init__(self) -> None:
        self.timing: Iterable[Any] = ()
        self.memory: dict[str, Iterable[Any]] = {}
        self.compared: list[list[Row]] = []
        self.weighed: list[list[Row]] = []

    def stream(self, function: object, rows: list[Row], device: str, *budget: float) -> Iterator[Any]:
        assert device == "cpu"
        if function is measure.compare:
            assert budget == (3.0,)
            self.compared.append(rows)
            yield from self.timing
        else:
            assert function is measure.weigh
            self.weighed.append(rows)
            yield from self.memory.get(rows[0].subject, [(row, {"parameter_bytes": 7}) for row in rows])


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    made = Workers()
    monkeypatch.setattr(sessions, "stream", made.stream)
    return made


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def session(workers: Workers, told: list[str], tmp_path: Path) -> Session:
    made = Session("cpu", 3.0, Records(tmp_path), told.append)
    made.planned = [ONE, TWO]
    return made


def written(session: Session) -> list[dict[str, Any]]:
    return [json.loads(line) for line in session.records.path.read_text().splitlines()]


def test_a_comparison_is_measured_as_a_whole_with_its_base_when_the_first_result_is_wanted(
    session: Session, workers: Workers
) -> None:
    training = row("one", "separate", "train")
    session.planned = [ONE, training, TWO]
    workers.timing = [FINGERPRINT, timing(ONE, 1.0), timing(TWO, 2.0), timing(BASE, 0.5)]

    assert session.result(TWO).seconds == [2.0] * ROUNDS
    assert session.result(ONE).seconds == [1.0] * ROUNDS
    assert session.result(BASE).seconds == [0.5] * ROUNDS
    assert workers.compared == [[BASE, ONE, TWO]]
    session.result(training)
    assert workers.compared[1:] == [[training.base(), training]]


def test_phases_of_one_arm_are_weighed_in_one_process_and_arms_in_one_each(session: Session, workers: Workers) -> None:
    prefill = row("one", "separate", "prefill")
    session.planned = [prefill, ONE, TWO]
    workers.timing = [timing(of, 1.0) for of in (prefill.base(), BASE, prefill, ONE, TWO)]
    session.result(ONE)

    assert workers.weighed == [[prefill.base(), BASE], [prefill, ONE], [TWO]]
    assert session.result(prefill).memory == {"parameter_bytes": 7}


@pytest.mark.parametrize(
    ("kind", "failure"), [("wrong", "Wrong: q_proj"), ("oom", "oom: Wrong: q_proj"), ("error", "error: Wrong: q_proj")]
)
def test_a_refused_row_fails_with_the_reason_and_is_not_weighed(
    session: Session, workers: Workers, kind: str, failure: str
) -> None:
    workers.timing = [FINGERPRINT, Refusal(ONE, kind, "Wrong: q_proj"), timing(TWO, 2.0), timing(BASE, 0.5)]

    assert session.result(ONE).failure == failure
    assert not session.result(TWO).failure
    assert workers.weighed == [[BASE], [TWO]]
    (record,) = (record for record in written(session) if record["quantity"] == "failure")
    assert (record["subject"], record["kind"], record["text"]) == ("one", kind, "Wrong: q_proj")


def test_a_lost_worker_fails_what_it_had_not_finished_and_nothing_else(session: Session, workers: Workers) -> None:
    third = row("three", "separate")
    session.planned.append(third)
    workers.timing = [
        FINGERPRINT,
        Refusal(ONE, "wrong", "Wrong: q_proj"),
        timing(TWO, 2.0),
        Failure("crashed", "SIGKILL"),
    ]
    session.result(ONE)

    assert session.results[ONE].failure == "Wrong: q_proj"
    assert not session.results[TWO].failure
    assert session.results[third].failure == session.results[BASE].failure == "crashed: SIGKILL"
    failed = [record["subject"] for record in written(session) if record["quantity"] == "failure"]
    assert failed == ["one", "base", "three"]


def test_a_further_group_s_base_does_not_replace_the_first_one_s(session: Session, workers: Workers) -> None:
    workers.timing = [timing(ONE, 1.0, 0.5), timing(BASE, 0.5, 0.5), timing(TWO, 1.0, 0.25), timing(BASE, 0.25, 0.25)]
    session.result(ONE)

    assert session.results[BASE].seconds == [0.5] * ROUNDS
    ratios = [session.results[of].ratio for of in (ONE, TWO, BASE)]
    assert [ratio.median if ratio else None for ratio in ratios] == [2.0, 4.0, 1.0]
    assert [record["subject"] for record in written(session) if record["quantity"] == "latency"] == [
        "one",
        "base",
        "two",
    ]


def test_memory_that_cannot_be_taken_is_unavailable_with_the_reason(session: Session, workers: Workers) -> None:
    prefill = row("one", "separate", "prefill")
    session.planned = [prefill, ONE]
    workers.timing = [timing(of, 1.0) for of in (prefill.base(), BASE, prefill, ONE)]
    workers.memory["one"] = [(prefill, {"parameter_bytes": 7}), Failure("oom", "out of memory")]

    assert session.result(ONE).memory == {"attribution": "unavailable (out of memory)"}
    assert session.result(prefill).memory == {"parameter_bytes": 7}
    assert not session.result(ONE).failure


def test_every_measurement_is_a_record_with_device_fingerprint_and_raw_samples(
    session: Session, workers: Workers
) -> None:
    workers.timing = [FINGERPRINT, timing(ONE, 1.0), timing(TWO, 2.0), timing(BASE, 0.5)]
    session.result(ONE)
    records = written(session)

    found = [f"{record['quantity']} {record['subject']}" for record in records]
    assert found == ["latency one", "latency two", "latency base", "memory base", "memory one", "memory two"]
    for record in records:
        assert record["device"] == "cpu"
        assert record["fingerprint"] == FINGERPRINT
        assert Row(record["subject"], Workload(**record["workload"])) in (ONE, TWO, BASE)
    first = records[0]
    assert first["samples_seconds"] == [1.0] * ROUNDS
    assert first["base_samples_seconds"] == [0.5] * ROUNDS
    assert first["interleaved_with"] == [str(ONE), str(BASE)]
    assert first["correctness"] == {"checks": 14, "error_ratio": 0.5, "visibility": 9.0}
    assert records[2]["correctness"] is None
    assert records[3]["memory"] == {"parameter_bytes": 7}


def test_what_is_done_is_told(session: Session, workers: Workers, told: list[str]) -> None:
    workers.timing = [Progress("timing decode"), *(timing(of, 1.0) for of in (ONE, TWO, BASE))]
    session.result(ONE)

    assert told == [
        "building and proving 3 arms of micro",
        "timing decode",
        "memory of base, in a process of its own",
        "memory of one separate, in a process of its own",
        "memory of two separate, in a process of its own",
    ]


def test_what_goes_beside_the_samples_is_json_and_says_all(session: Session, workers: Workers) -> None:
    workers.timing = [FINGERPRINT, timing(ONE, 1.0), timing(BASE, 0.5)]
    info = json.loads(json.dumps(session.extra_info(session.result(ONE))))

    assert info == {
        "subject": "one",
        "workload": ONE.workload.as_dict(),
        "device": "cpu",
        "fingerprint": FINGERPRINT,
        "tokens_per_second": 2.0,
        "ratio_to_base": {"median": 2.0, "low": 2.0, "high": 2.0, "confidence": 0.95},
        "interleaved_with": [str(ONE), str(BASE)],
        "memory": {"parameter_bytes": 7},
        "proof": {"checks": 14, "error_ratio": 0.5, "visibility": 9.0},
    }


def test_figures_come_from_the_samples() -> None:
    result = Result(
        row("one", "separate", "prefill"), [4.0, 1.0, 2.0, 3.0, 5.0, 6.0, 7.0], [2.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    )

    assert (result.latency.median, result.latency.low, result.latency.high) == (4.0, 1.0, 7.0)
    assert result.ratio is not None
    assert result.ratio.median == 3.0
    assert result.tokens_per_second == 12 / 4.0
    assert Result(ONE, [1.0]).ratio is None
