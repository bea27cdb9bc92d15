"""What a run keeps of a row beside its samples: the parts of a switch, and what a GPU tells of launches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_bench.bench.counts import Ceilings
from lora_bench.bench.records import Records, read
from lora_bench.bench.session import Session
from lora_bench.bench.turns import Launches
from tests.micro_rows import row
from tests.scripted_workers import FINGERPRINT, ROUNDS, Workers, dies, says, timing, workers

__all__ = ["workers"]

ONE, TWO = row("one", "separate", "decode"), row("two", "separate", "decode")
BASE = ONE.base()


@pytest.fixture
def session(workers: Workers, tmp_path: Path) -> Session:
    made = Session("cpu", 3.0, Records(tmp_path), lambda _text: None)
    made.planned = [ONE, TWO]
    return made


def written(session: Session, quantity: str) -> list[dict[str, Any]]:
    return [record for record in read(session.records.path) if record["quantity"] == quantity]


def test_the_parts_of_a_switch_go_beside_its_samples_and_into_its_record(session: Session, workers: Workers) -> None:
    switch = row("one", "separate", "switch")
    parts = {"load": [0.5] * ROUNDS}
    session.plan([switch])
    workers.comparisons = [says(FINGERPRINT, timing(switch.base()), timing(switch)._replace(parts=parts))]

    assert session.extra_info(session.result(switch))["parts_seconds"] == parts
    latencies = [each for each in read(session.records.path) if each["quantity"] == "latency"]
    assert [each["parts_seconds"] for each in latencies] == [{}, parts]


def test_what_a_gpu_tells_beside_the_samples_is_kept_once_and_may_name_the_bound(
    session: Session, workers: Workers
) -> None:
    found = {"launch_share": 0.6, "cold_seconds": [1.0]}
    told = [Launches(of, found) for of in (BASE, ONE, TWO)] + [Launches(BASE, {"launch_share": 0.1})]
    told[2] = Launches(TWO, {"launch_share": 0.5, "graph_seconds": "unavailable (why)"})
    workers.comparisons = [says(FINGERPRINT, Ceilings(1e9, 1e9), *map(timing, (BASE, ONE, TWO)), *told)]
    infos = {of: session.extra_info(session.result(of)) for of in (BASE, ONE, TWO)}

    assert infos[ONE]["launches"] == infos[BASE]["launches"] == found
    assert [record["launches"] for record in written(session, "launches")] == [each.found for each in told[:3]]
    bounds = [session.bound(of) for of in (ONE, TWO)]
    assert [bound.by for bound in bounds if bound] == ["launches", "bytes"]
    assert infos[ONE]["bound"]["by"] == "launches"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_worker_that_dies_after_all_are_timed_costs_a_gpu_s_row_its_launches_alone(
    session: Session, workers: Workers, device: str
) -> None:
    session.device = device
    times = FINGERPRINT, Ceilings(1e9, 1e9), *map(timing, (BASE, ONE, TWO)), Launches(BASE, {"launch_share": 0.1})
    workers.comparisons = [lambda rows: (*times, *dies("crashed", "exit", of=TWO)(rows))]

    assert not session.result(TWO).failure
    assert session.result(TWO).seconds == [1.0] * ROUNDS
    why = {"launch_share": "unavailable (crashed: exit)"}
    assert session.result(TWO).launches == (why if device == "cuda" else {})
    assert [record["launches"] for record in written(session, "launches")][1:] == [why] * (device == "cuda")
    assert len(workers.compared) == 1
    assert session.bound(TWO) is not None
