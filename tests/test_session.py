"""One run: which rows are measured together, what is kept of what the workers say, and what is written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_bench.bench.counts import Ceilings, count, reconciled
from lora_bench.bench.records import Records, read
from lora_bench.bench.session import SECONDS, Session
from lora_bench.bench.turns import Progress, Refusal
from lora_bench.bench.workload import Row, Workload
from tests.micro_rows import row
from tests.scripted_workers import (
    ENERGY,
    FINGERPRINT,
    MEMORY,
    ROUNDS,
    WINDOW,
    Workers,
    dies,
    powers_all,
    says,
    timing,
    weighs_all,
    workers,
)

__all__ = ["workers"]

ONE, TWO = row("one", "separate", "decode"), row("two", "separate", "decode")
PREFILL = row("one", "separate", "prefill")
TRAINING = row("one", "separate", "train")
BASE = ONE.base()


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def session(workers: Workers, told: list[str], tmp_path: Path) -> Session:
    made = Session("cpu", 3.0, Records(tmp_path), told.append)
    made.planned = [ONE, TWO]
    return made


def written(session: Session, quantity: str) -> list[dict[str, Any]]:
    return [record for record in read(session.records.path) if record["quantity"] == quantity]


def failures(session: Session) -> dict[Row, str]:
    return {row: result.failure for row, result in session.results.items() if result.failure}


# --- who is measured together ---------------------------------------------------------------------------------------


def test_a_comparison_is_measured_as_a_whole_with_its_base_when_the_first_result_is_wanted(
    session: Session, workers: Workers
) -> None:
    session.planned = [ONE, TRAINING, TWO]
    workers.comparisons = [says(FINGERPRINT, timing(ONE, 1.0), timing(TWO, 2.0), timing(BASE))]

    assert session.result(TWO).seconds == [2.0] * ROUNDS
    assert session.result(ONE).seconds == [1.0] * ROUNDS
    assert session.result(BASE).seconds == [0.5] * ROUNDS
    assert workers.compared == [[BASE, ONE, TWO]]
    session.result(TRAINING)
    assert workers.compared[1:] == [[TRAINING.base(), TRAINING]]
    assert [session.result(of).memory for of in (ONE, TRAINING)] == [MEMORY] * 2
    assert len(workers.compared) == 2
    assert not workers.powered


def test_phases_of_one_arm_are_weighed_in_one_process_and_arms_in_one_each(session: Session, workers: Workers) -> None:
    ranked = row("one", "separate", "decode", rank=8)
    session.planned = [PREFILL, ONE, TWO, ranked]
    session.result(ONE)

    assert workers.weighed == [[PREFILL.base(), BASE], [PREFILL, ONE], [TWO], [ranked]]
    assert session.result(PREFILL).memory == MEMORY


@pytest.mark.parametrize("seconds", [None, 0.0, 7.0])
def test_a_worker_hangs_after_the_seconds_that_the_session_has(
    session: Session, workers: Workers, seconds: float | None
) -> None:
    if seconds is not None:
        session.seconds = seconds
    session.result(ONE)

    assert workers.patience == {SECONDS if seconds is None else seconds}


def test_a_further_group_s_base_does_not_replace_the_first_one_s(session: Session, workers: Workers) -> None:
    workers.comparisons = [
        says(timing(ONE, 1.0), timing(BASE), timing(TWO, 1.0, base_seconds=0.25), timing(BASE, base_seconds=0.25))
    ]
    session.result(ONE)

    assert session.results[BASE].seconds == [0.5] * ROUNDS
    ratios = [session.results[of].ratio for of in (ONE, TWO, BASE)]
    assert [ratio.median if ratio else None for ratio in ratios] == [2.0, 4.0, 1.0]
    assert [record["subject"] for record in written(session, "latency")] == ["one", "base", "two"]


def test_energy_is_taken_of_every_arm_only_where_it_is_asked_for(session: Session, workers: Workers) -> None:
    session.energy_seconds = 9.0
    session.planned = [PREFILL, ONE, TWO]
    workers.powerings = [powers_all, dies("crashed", "exit", (PREFILL, ENERGY), of=ONE)]
    session.result(ONE)

    assert workers.powered == workers.weighed == [[PREFILL.base(), BASE], [PREFILL, ONE], [TWO]]
    assert [session.results[of].energy for of in (BASE, PREFILL, TWO)] == [ENERGY] * 3
    assert session.results[ONE].energy == {"attribution": "unavailable (crashed: exit)"}
    assert [record["energy"] for record in written(session, "energy")][2:4] == [ENERGY, session.results[ONE].energy]


# --- what fails -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "failure"), [("wrong", "Wrong: q_proj"), ("oom", "oom: Wrong: q_proj"), ("error", "error: Wrong: q_proj")]
)
def test_a_refused_row_fails_with_the_reason_and_is_not_weighed(
    session: Session, workers: Workers, kind: str, failure: str
) -> None:
    workers.comparisons = [says(FINGERPRINT, Refusal(ONE, kind, "Wrong: q_proj"), timing(TWO), timing(BASE))]

    assert session.result(ONE).failure == failure
    assert failures(session) == {ONE: failure}
    assert len(workers.compared) == 1
    assert workers.weighed == [[BASE], [TWO]]
    (record,) = written(session, "failure")
    assert (record["subject"], record["kind"], record["text"]) == ("one", kind, failure)


def test_the_row_that_a_worker_died_of_fails_and_the_others_are_measured_without_it(
    session: Session, workers: Workers
) -> None:
    three = row("three", "separate", "decode")
    session.planned.append(three)
    workers.comparisons = [dies("crashed", "SIGSEGV", of=ONE), dies("timeout", "1 s", timing(BASE), of=three)]
    session.result(TWO)

    assert failures(session) == {ONE: "crashed: SIGSEGV", three: "timeout: 1 s"}
    assert workers.compared == [[BASE, ONE, TWO, three], [BASE, TWO, three], [BASE, TWO]]
    assert session.result(TWO).memory == MEMORY
    assert [record["subject"] for record in written(session, "latency")] == ["base", "two"]
    assert [record["subject"] for record in written(session, "failure")] == ["one", "three"]


@pytest.mark.parametrize("of", [None, BASE], ids=["nobody", "base"])
def test_what_dies_of_the_base_or_of_nobody_fails_all_that_is_left_and_nothing_else(
    session: Session, workers: Workers, of: Row | None
) -> None:
    three = row("three", "separate", "decode")
    session.planned = [ONE, TWO, three, PREFILL]
    workers.comparisons = [
        dies("crashed", "SIGKILL", timing(PREFILL), Refusal(ONE, "wrong", "Wrong: q_proj"), timing(TWO), of=of)
    ]
    session.result(ONE)

    text = "crashed: SIGKILL"
    assert failures(session) == {ONE: "Wrong: q_proj", three: text, BASE: text, PREFILL.base(): text}
    assert [session.results[of].memory for of in (PREFILL, TWO)] == [MEMORY] * 2
    assert len(workers.compared) == 1
    assert len(written(session, "failure")) == 4


def test_a_worker_that_dies_after_its_row_was_measured_costs_nothing(session: Session, workers: Workers) -> None:
    workers.comparisons = [dies("crashed", "exit", timing(BASE), timing(ONE), of=ONE)]
    session.result(ONE)

    assert not failures(session)
    assert workers.compared == [[BASE, ONE, TWO], [BASE, TWO]]
    assert not written(session, "failure")


def test_a_base_that_is_refused_in_every_attempt_has_failed_once(session: Session, workers: Workers) -> None:
    refused = Refusal(BASE, "oom", "full")
    workers.comparisons = [dies("crashed", "exit", refused, of=ONE), says(FINGERPRINT, refused, timing(TWO))]
    session.result(ONE)

    assert failures(session) == {ONE: "crashed: exit", BASE: "oom: full"}
    assert [record["subject"] for record in written(session, "failure")] == ["base", "one"]


def test_a_worker_that_ends_without_a_word_about_a_row_has_failed_it(session: Session, workers: Workers) -> None:
    workers.comparisons = [says(FINGERPRINT, timing(ONE), timing(BASE))]
    session.result(ONE)

    assert failures(session) == {TWO: "error: the worker ended without a word about it"}


def test_memory_that_cannot_be_taken_is_unavailable_with_the_reason(session: Session, workers: Workers) -> None:
    session.planned = [PREFILL, ONE, TWO]
    workers.weighings = [
        weighs_all,
        dies("oom", "full", (PREFILL, MEMORY), of=ONE),
        dies("crashed", "exit"),
    ]
    session.result(ONE)

    assert session.results[PREFILL].memory == MEMORY
    assert session.results[ONE].memory == {"attribution": "unavailable (oom: full)"}
    assert session.results[TWO].memory == {"attribution": "unavailable (crashed: exit)"}
    assert not failures(session)
    assert len(written(session, "memory")) == 5


def test_a_phase_that_cannot_be_weighed_costs_its_own_alone(session: Session, workers: Workers) -> None:
    session.planned = [PREFILL, ONE]
    workers.weighings = [weighs_all, dies("timeout", "1 s", of=PREFILL)]
    session.result(ONE)

    assert workers.weighed[1:] == [[PREFILL, ONE], [ONE]]
    assert session.results[PREFILL].memory == {"attribution": "unavailable (timeout: 1 s)"}
    assert session.results[ONE].memory == MEMORY


def test_a_lost_gpu_ends_everything_and_keeps_what_is_measured(session: Session, workers: Workers) -> None:
    session.planned = [PREFILL, ONE, TRAINING]
    lost = dies("gpu_lost", "GpuLost: fell off", timing(PREFILL), timing(PREFILL.base()), of=ONE)
    workers.comparisons = [lost]
    for of in session.planned:
        session.result(of)

    text = "gpu_lost: GpuLost: fell off"
    assert session.lost == "GpuLost: fell off"
    assert failures(session) == dict.fromkeys([ONE, BASE, TRAINING, TRAINING.base()], text)
    assert session.results[PREFILL].measured
    # No worker touches a lost device; and what was not weighed is no record, for a resumed run to weigh it.
    assert (len(workers.compared), workers.weighed) == (1, [])
    assert session.results[PREFILL].memory == {"attribution": "unavailable (gpu_lost: GpuLost: fell off)"}
    assert not written(session, "memory")
    assert {record["kind"] for record in written(session, "failure")} == {"gpu_lost"}


def test_a_gpu_that_is_lost_while_weighing_ends_everything_too(session: Session, workers: Workers) -> None:
    session.planned = [ONE, TWO, TRAINING]
    workers.weighings = [weighs_all, dies("gpu_lost", "fell off", of=ONE)]
    for of in session.planned:
        session.result(of)

    assert session.lost == "fell off"
    assert failures(session) == dict.fromkeys([TRAINING, TRAINING.base()], "gpu_lost: fell off")
    assert workers.weighed == [[BASE], [ONE]]
    assert [record["subject"] for record in written(session, "memory")] == ["base"]
    assert session.results[TWO].memory == {"attribution": "unavailable (gpu_lost: fell off)"}


# --- what is written and told ---------------------------------------------------------------------------------------


def test_every_measurement_is_a_record_with_device_fingerprint_and_raw_samples(
    session: Session, workers: Workers
) -> None:
    session.plan([ONE, TWO])
    session.result(ONE)
    plan, *records = read(session.records.path)

    assert (plan["quantity"], plan["device"]) == ("plan", "cpu")
    assert [Row(each["subject"], Workload(**each["workload"])) for each in plan["rows"]] == [ONE, TWO]
    found = [f"{record['quantity']} {record['subject']}" for record in records]
    assert found == ["latency base", "latency one", "latency two", "memory base", "memory one", "memory two"]
    for record in records:
        assert record["device"] == "cpu"
        assert record["fingerprint"] == FINGERPRINT
        assert Row(record["subject"], Workload(**record["workload"])) in (ONE, TWO, BASE)
    base, first = records[:2]
    assert first["samples_seconds"] == [1.0] * ROUNDS
    assert first["order"] == first["base_order"] == list(range(ROUNDS))
    assert first["interrupted"] == first["base_interrupted"] == [False] * ROUNDS
    assert first["base_samples_seconds"] == [0.5] * ROUNDS
    assert first["interleaved_with"] == [str(ONE)]
    assert first["window"] == WINDOW
    assert first["correctness"] == {"checks": 14, "error_ratio": 0.5, "visibility": 9.0}
    assert base["correctness"] is None
    assert records[3]["memory"] == MEMORY


def test_every_planned_row_has_a_result_before_it_is_reached(session: Session, workers: Workers) -> None:
    session.plan([ONE, TWO])

    assert [session.results[of].pending for of in (ONE, TWO)] == [True, True]
    assert not session.settled(ONE)


def test_what_is_done_is_told(session: Session, workers: Workers, told: list[str]) -> None:
    workers.comparisons = [says(FINGERPRINT, Progress("timing decode"), *map(timing, (ONE, TWO, BASE)))]
    session.result(ONE)

    assert told == [
        "building and proving 3 arms of micro",
        "timing decode",
        "memory of base, in a process of its own",
        "memory of one separate r4, in a process of its own",
        "memory of two separate r4, in a process of its own",
    ]


def test_what_goes_beside_the_samples_is_json_and_says_all(session: Session, workers: Workers) -> None:
    info = json.loads(json.dumps(session.extra_info(session.result(ONE))))

    assert info == {
        "subject": "one",
        "workload": ONE.workload.as_dict(),
        "device": "cpu",
        "fingerprint": FINGERPRINT,
        "tokens_per_second": 2.0,
        "ratio_to_base": {"median": 2.0, "low": 2.0, "high": 2.0, "confidence": 0.95},
        "interleaved": True,
        "interleaved_with": [str(ONE)],
        "percentiles_seconds": {"p50": 1.0},
        "parts_seconds": {},
        "bound": None,
        "window": WINDOW,
        "launches": {},
        "memory": MEMORY,
        "reconciled": reconciled(ONE.workload, "cpu", MEMORY),
        "energy": {},
        "proof": {"checks": 14, "error_ratio": 0.5, "visibility": 9.0},
    }


def test_the_first_ceilings_of_a_dtype_are_the_run_s_and_bound_its_steps(session: Session, workers: Workers) -> None:
    other = row("one", "separate", "decode", dtype="bf16")
    session.planned = [ONE, TRAINING, other]
    ceilings = [Ceilings(float(at), 1e30) for at in (1000, 2000, 3000)]
    workers.comparisons = [
        says(FINGERPRINT, ceiling, *map(timing, (of, of.base())))
        for of, ceiling in zip(session.planned, ceilings, strict=True)
    ]
    for of in session.planned:
        session.result(of)

    assert session.ceilings == {"fp32": ceilings[0], "bf16": ceilings[2]}
    assert [record["dtype"] for record in written(session, "ceilings")] == ["fp32", "bf16"]
    counted, bounded = count(ONE.workload), session.extra_info(session.result(ONE))["bound"]
    seconds = counted.bytes / 1000
    assert bounded == {"seconds": seconds, "by": "bytes", **counted._asdict(), "fraction": seconds / 1.0}
    assert session.bound(Row("one", Workload(**ONE.workload.as_dict() | {"model": "some/checkpoint"}))) is None
