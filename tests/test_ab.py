"""Comparisons driven to their verdicts on scripted workers: what is asked of whom, and what each failure means."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lora_bench.bench.workload import Workload
from lora_bench.gate import ab
from lora_bench.gate.ab import Duel, compare, comparison_of
from lora_bench.gate.environments import here
from lora_bench.gate.pair import SIDES
from lora_bench.gate.verdict import FAIL, INCONCLUSIVE, PASS, Comparison
from lora_bench.gate.workers import Broken
from tests.scripted_servers import STARTED, ScriptedServer, ScriptedWorker

DECODE, PREFILL = (Workload("separate", phase, "micro", "fp32", 4, 1, 8) for phase in ("decode", "prefill"))


@pytest.fixture(autouse=True)
def _scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    STARTED.clear()
    ScriptedServer.seconds = {"base": 1.0, "head": 1.0, "control": 1.0}
    ScriptedServer.faults = {}
    monkeypatch.setattr(ab, "Server", ScriptedServer)


def run(*workloads: Workload) -> tuple[list[Duel], list[str]]:
    duels, heard = [Duel(workload, Comparison()) for workload in workloads], []
    side = here("reference")
    compare(side, side, duels, "cpu", pair_seconds=1.0, hear=lambda duel: heard.append(duel.workload.phase))
    return duels, heard


def test_equals_pass_and_each_pair_is_heard() -> None:
    (duel,), heard = run(DECODE)

    assert duel.verdict == PASS
    assert heard == ["decode"] * 7


def test_a_worker_is_told_which_files_are_its_sides_own(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, list[str]]] = []
    start = ScriptedServer.start

    def noted(server: ScriptedServer, task: dict[str, Any]) -> ScriptedWorker:
        told.append((server.side, list(task["own"])))
        return start(server, task)

    monkeypatch.setattr(ScriptedServer, "start", noted)
    base, head = here("reference")._replace(own=("one",)), here("reference")._replace(own=("two", "three"))
    compare(base, head, [Duel(DECODE, Comparison())], "cpu", pair_seconds=1.0, hear=lambda _: None)

    assert told[:3] == [("base", ["one"]), ("head", ["two", "three"]), ("control", ["one"])]


def test_sides_swap_from_pair_to_pair() -> None:
    run(DECODE)

    starts = [side for side in STARTED if side in SIDES]
    assert starts[:6] == ["base", "head", "control", "control", "head", "base"]


def test_no_side_is_always_first_or_last() -> None:
    orders = [ab.order(number) for number in range(6)]

    assert len(set(orders)) == 6
    for one, other in zip(orders[::2], orders[1::2], strict=True):
        assert one == other[::-1]
    assert ab.order(6) == orders[0]


def test_every_pair_has_interpreters_of_its_own() -> None:
    run(DECODE, PREFILL)

    assert STARTED.count("base ended") == STARTED.count("head ended") == STARTED.count("control ended") == 7
    assert STARTED.count("head closed") == 14


def test_slower_fails_after_two_attempts() -> None:
    ScriptedServer.seconds["head"] = 1.1

    (duel,), heard = run(DECODE)

    assert duel.verdict == FAIL
    assert len(heard) == 14


@pytest.mark.parametrize(
    ("side", "kind", "verdict"),
    [
        ("head", "wrong", FAIL),
        ("head", "oom", FAIL),
        ("head", "crashed", FAIL),
        ("head", "timeout", FAIL),
        ("head", "not_offered", INCONCLUSIVE),
        ("head", "not_used", INCONCLUSIVE),
        ("head", "gpu_lost", INCONCLUSIVE),
        ("head", "protocol", INCONCLUSIVE),
        ("base", "wrong", INCONCLUSIVE),
        ("control", "crashed", INCONCLUSIVE),
    ],
)
def test_a_fault_costs_its_workload_alone(side: str, kind: str, verdict: str) -> None:
    ScriptedServer.faults["head" if side == "head" else side, "prefill"] = Broken(side, kind, "so it is")

    decode, prefill = run(DECODE, PREFILL)[0]

    assert (prefill.verdict, prefill.because) == (verdict, f"{side}: {kind}: so it is")
    assert prefill.lost == (kind == "gpu_lost")
    # A lost device ends all; anything else leaves the other workload to be settled.
    assert decode.verdict == (INCONCLUSIVE if kind == "gpu_lost" else PASS)


@pytest.mark.parametrize(("kind", "again"), [("oom", 1), ("crashed", 1), ("timeout", 1), ("wrong", 0), ("error", 0)])
def test_what_may_be_the_machine_s_fault_is_tried_again(kind: str, again: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScriptedServer, "once", True)
    ScriptedServer.faults["head", "decode"] = Broken("head", kind, "so it is")

    (duel,), heard = run(DECODE)

    assert duel.verdict == (PASS if again else FAIL)
    assert (duel.stumbled is not None) == bool(again)
    assert len(heard) == (8 if again else 1)


def test_the_second_time_the_sides_come_in_the_other_order() -> None:
    """So that where there is memory for one alone it is not always head that gets none."""
    ScriptedServer.faults["head", "decode"] = Broken("head", "oom", "no memory")

    run(DECODE)

    assert [side for side in STARTED if side in SIDES] == ["base", "head", "control", "head"]


@pytest.mark.parametrize(("side", "verdict"), [("base", INCONCLUSIVE), ("head", FAIL)])
def test_a_side_that_does_not_start_ends_all(side: str, verdict: str) -> None:
    ScriptedServer.faults[side, ""] = Broken(side, "crashed", "no torch")

    duels = run(DECODE, PREFILL)[0]

    assert [duel.verdict for duel in duels] == [verdict, verdict]
    assert [each for each in STARTED if each in SIDES] == []


def test_a_calibration_takes_as_many_pairs_as_are_wanted() -> None:
    duel, side = Duel(DECODE, Comparison(), wanted=20), here("reference")

    compare(side, side, [duel], "cpu", pair_seconds=1.0, hear=lambda _: None)

    assert len(duel.pairs) == 20


def test_a_calibration_of_a_throttled_device_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScriptedServer, "throttled", True)
    duel, side = Duel(DECODE, Comparison(), wanted=20), here("reference")

    compare(side, side, [duel], "cpu", pair_seconds=1.0, hear=lambda _: None)

    assert duel.pairs == []
    assert duel.because == "8 pairs were throttled"


def test_its_record_gives_the_comparison_back() -> None:
    ScriptedServer.seconds["head"] = 1.1
    (duel,), _ = run(DECODE)
    sides = {name: {"name": name, "subject": "reference"} for name in ("base", "head")}

    record = json.loads(json.dumps(duel.as_record(sides)))

    assert (record["quantity"], record["subject"], record["verdict"]) == ("ab", "reference", FAIL)
    assert Workload(**record["workload"]) == DECODE
    assert record["fingerprint"] == {"hard": {"device": "cpu"}}
    assert comparison_of(record) == duel.comparison


@pytest.mark.parametrize("lost", ["limits", "attempts"])
def test_a_record_that_lacks_something_is_refused(lost: str) -> None:
    record = run(DECODE)[0][0].as_record({name: {"subject": ""} for name in ("base", "head")})
    del record[lost]

    with pytest.raises(ValueError, match=f"lacks or has too much: '{lost}'"):
        comparison_of(record)
