"""A run that was cut off, and goes on: what it had is kept, what it had not is measured, and nothing twice."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from lora_bench.bench import records as recording
from lora_bench.bench import session as sessions
from lora_bench.bench.counts import Ceilings
from lora_bench.bench.records import Records, read
from lora_bench.bench.session import Session
from lora_bench.bench.turns import Refusal
from lora_bench.bench.workload import Row, Workload
from tests import scripted_workers
from tests.micro_rows import row, with_bases
from tests.scripted_workers import ENERGY, FINGERPRINT, MEMORY, Workers, dies, says, timing, workers

__all__ = ["workers"]

ONE, TWO = row("one", "separate", "decode"), row("two", "separate", "decode")
BASE = ONE.base()
PLAN = [BASE, ONE, TWO]
ELSEWHERE = {"hard": {"device_name": "B", "torch": "2"}, "soft": {}}
DIFFERS = "the run began with device_name A, and here it is B"


def begin(folder: Path, plan: list[Row] = PLAN, resume: str | None = None) -> Session:
    session = Session("cpu", 3.0, Records(folder, resume), lambda _text: None)
    session.plan(plan)
    return session


def go_on(session: Session) -> Session:
    return begin(session.records.path.parent, session.planned, session.records.run_id)


def measured(session: Session) -> list[dict[str, Any]]:
    for of in session.planned:
        session.result(of)
    return read(session.records.path)


def cut(session: Session, *quantities: str) -> None:
    """Leave only records of these quantities."""
    lines = session.records.path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["quantity"] in ("plan", *quantities)]
    session.records.path.write_text("".join(kept))


def test_a_whole_run_is_not_measured_again(workers: Workers, tmp_path: Path) -> None:
    first = begin(tmp_path)
    workers.comparisons = [says(FINGERPRINT, Ceilings(1.0, 2.0), *map(timing, PLAN))]
    records = measured(first)
    again = go_on(first)

    assert measured(again) == records
    assert (len(workers.compared), len(workers.weighed)) == (1, 3)
    assert again.results == first.results
    assert (again.fingerprint, again.ceilings) == (FINGERPRINT, {"fp32": Ceilings(1.0, 2.0)})
    assert again.records.run_id == first.records.run_id


def test_a_run_goes_on_with_the_rows_that_it_had_not_and_their_base(workers: Workers, tmp_path: Path) -> None:
    first = begin(tmp_path)
    workers.comparisons = [dies("crashed", "exit", timing(BASE), timing(ONE, 9.0), of=TWO)]
    workers.weighings = [says(FINGERPRINT)]
    records = [each for each in measured(first) if each["quantity"] in ("plan", "latency")]
    cut(first, "latency")
    workers.compared.clear()
    workers.weighed.clear()
    again = go_on(first)
    found = measured(again)

    assert found[: len(records)] == records
    assert workers.compared == [[BASE, TWO]]
    assert workers.weighed == [[BASE], [ONE], [TWO]]
    assert again.results[ONE].latency.median == 9.0
    counts = Counter((each["quantity"], each["subject"]) for each in found[1:])
    assert counts == Counter((quantity, of.subject) for of in PLAN for quantity in ("latency", "memory"))


def test_a_run_without_its_energy_goes_on_for_it_alone(workers: Workers, tmp_path: Path) -> None:
    first = begin(tmp_path)
    measured(first)
    again = go_on(first)
    again.energy_seconds = 9.0
    measured(again)

    assert (len(workers.compared), len(workers.weighed)) == (1, 3)
    assert workers.powered == [[of] for of in PLAN]
    assert {result.energy["joules"] for result in go_on(again).results.values()} == {ENERGY["joules"]}


def test_what_has_failed_stays_failed_but_a_lost_gpu_is_tried_again(workers: Workers, tmp_path: Path) -> None:
    first = begin(tmp_path)
    workers.comparisons = [dies("gpu_lost", "fell off", Refusal(ONE, "wrong", "Wrong: q"), timing(BASE), of=TWO)]
    measured(first)
    again = go_on(first)
    measured(again)

    assert workers.compared[1:] == [[BASE, TWO]]
    assert (again.results[ONE].kind, again.results[ONE].failure) == ("wrong", "Wrong: q")
    assert not again.lost
    assert again.results[TWO].measured
    # The base, timed before the GPU was lost, is weighed only now.
    assert workers.weighed == [[BASE], [TWO]]
    assert again.results[BASE].memory == MEMORY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (PLAN[:2], f"had planned {TWO}: it goes on with the same options"),
        ([*PLAN, row("three", "separate", "decode")], f"had not planned {row('three', 'separate', 'decode')}: it goes"),
        ([BASE, ONE, row("two", "separate", "decode", rank=8)], f"had planned {TWO}: it goes on with the same options"),
    ],
    ids=["fewer", "more", "others"],
)
def test_with_other_rows_it_does_not_go_on(tmp_path: Path, change: list[Row], message: str) -> None:
    first = begin(tmp_path)
    before = first.records.path.read_bytes()

    with pytest.raises(ValueError, match=f"^the run {first.records.run_id} .*") as error:
        begin(tmp_path, change, first.records.run_id)
    assert message in str(error.value)
    assert first.records.path.read_bytes() == before


def elsewhere(rows: list[Row]) -> Iterator[Any]:
    yield ELSEWHERE
    raise AssertionError(f"asked for more of {rows}")


def test_on_another_machine_nothing_is_measured_nor_written(workers: Workers, tmp_path: Path) -> None:
    first = begin(tmp_path)
    workers.comparisons = [says(FINGERPRINT, timing(BASE), timing(ONE))]
    measured(first)
    cut(first, "latency")
    before = first.records.path.read_bytes()
    workers.comparisons, workers.weighings = [elsewhere], [elsewhere] * 2
    again = go_on(first)
    measured(again)

    assert first.records.path.read_bytes() == before
    assert (again.results[TWO].kind, again.results[TWO].failure) == ("not_comparable", f"not_comparable: {DIFFERS}")
    # What has its times keeps them; what they weigh here is not what they weighed there.
    assert again.results[ONE].measured
    assert again.results[ONE].memory == {"attribution": f"unavailable (not_comparable: {DIFFERS})"}
    assert again.differs == DIFFERS
    assert again.fingerprint == FINGERPRINT
    # On the first machine it may still go on.
    home = go_on(again)
    measured(home)
    assert home.results[TWO].measured
    assert home.results[ONE].memory == MEMORY


def test_where_only_the_soft_fingerprint_differs_it_goes_on(workers: Workers, tmp_path: Path) -> None:
    first = begin(tmp_path)
    workers.comparisons = [says(FINGERPRINT, timing(BASE), timing(ONE))]
    measured(first)
    cut(first, "latency")
    here = FINGERPRINT | {"soft": {"temperature": 60}}
    workers.comparisons = [says(here, timing(BASE), timing(TWO))]
    again = go_on(first)
    measured(again)

    assert again.results[TWO].measured
    assert again.fingerprint == here


# --- killed ---------------------------------------------------------------------------------------------------------


WATCHED = {module.__file__ for module in (sessions, recording, scripted_workers)}


def moments(do: Callable[[], object], last: int = -1) -> int:
    """How many calls and returns, of C functions too, there are in the code of a run; at the last it is SIGKILLed."""
    passed = 0

    def count(frame: FrameType, *_: object) -> None:
        nonlocal passed
        if frame.f_code.co_filename in WATCHED:
            passed += 1
            if passed == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    try:
        do()
    finally:
        sys.setprofile(None)
    return passed


def killed(folder: Path, plan: list[Row], run: str, moment: int) -> bool:
    """Go on in a forked child, SIGKILLed at that moment; False if it ended otherwise."""
    if not (child := os.fork()):
        try:
            moments(lambda: measured(begin(folder, plan, run)), moment)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_run_that_is_killed_ten_times_measures_its_plan_once(
    workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "git_state", lambda: None)
    each = itertools.product("abc", ("prefill", "decode", "train"), range(2, 6))
    plan = with_bases(*(row(name, "separate", phase, sequence=length) for name, phase, length in each))
    whole = moments(lambda: measured(begin(tmp_path / "whole", plan)))
    run, draw, lengths = begin(tmp_path, plan).records.run_id, random.Random(0), []
    recording.unlock(tmp_path / f"{run}.jsonl")  # as if this process had ended
    for _ in range(10):
        assert killed(tmp_path, plan, run, draw.randrange(1, whole // 4))
        lengths.append((tmp_path / f"{run}.jsonl").stat().st_size)
    assert len(set(lengths)) > 5, "it is to be killed at different places"
    records = measured(begin(tmp_path, plan, run))

    for quantity in ("latency", "memory"):
        found = [Row(each["subject"], Workload(**each["workload"])) for each in records if each["quantity"] == quantity]
        assert Counter(found) == Counter(plan)
    assert {each["quantity"] for each in records} == {"plan", "latency", "memory"}


@pytest.mark.parametrize("cut_off", [1, 20])
def test_a_run_killed_in_the_middle_of_a_line_measures_that_row_again(
    workers: Workers, tmp_path: Path, cut_off: int
) -> None:
    first = begin(tmp_path)
    records = measured(first)
    whole = first.records.path.read_bytes()
    first.records.path.write_bytes(whole[:-cut_off])

    found = measured(go_on(first))
    assert [{**each, "time": ""} for each in found] == [{**each, "time": ""} for each in records]
    assert workers.weighed[3:] == [[TWO]]
