"""The gate's error rates on recorded traces: what it told then, and what its rules tell of them now.

`gate_traces.npz` are seconds in microseconds of a hundred 64 x 64 products on a noisy 2-core machine: 70 sets of worker
processes, each with the product, the same again, and 2, 5 and 10 per cent more of it. `gate_trials.jsonl.gz` is what
`python -m lora_bench.gate.experiment` wrote: the statistics of every pair.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lora_bench.gate.experiment import ARMS, EQUAL, TAIL_ARM, main, rates, table
from lora_bench.gate.pair import LOCATION
from lora_bench.gate.verdict import FAIL, INCONCLUSIVE, PASS, Comparison

if TYPE_CHECKING:
    from collections.abc import Sequence

DATA = Path(__file__).parent / "data"
DRAWS = 200


@dataclass(frozen=True)
class Seen:
    """A pair of which only its statistics were kept."""

    location: float
    tail: float
    control: float
    throttled: bool = False
    restless: bool = False
    tells_tail: bool = True

    def log_ratio(self, percentile: int, side: str = "head") -> float:
        if side == "control":
            return self.control
        return self.location if percentile == LOCATION else self.tail


def verdict_of(pairs: Sequence[Any]) -> str:
    """What the gate tells of pairs that come in this order."""
    comparison, coming = Comparison(), iter(pairs)
    while not comparison.settled:
        comparison.add(next(coming))
    return comparison.verdict


@pytest.fixture(scope="module")
def traces() -> dict[str, list[Seen]]:
    """The recorded processes as pairs, by arm; the second plain arm is the control, and in "A/A" head as well.

    What was interrupted was not recorded: nothing is quarantined, and a few pairs in a hundred are off by a third.
    """
    with np.load(DATA / "gate_traces.npz") as file:
        arms, workers = file["arms"].tolist(), np.log(np.percentile(file["workers"].astype(float), [10, 90], axis=2))
    location, tail = workers - workers[..., :1]
    control = location[:, arms.index("Ap")]
    heads = {"A/A": "Ap", "+2 %": "B2", "+5 %": "B5", "+10 %": "B10"}
    return {
        name: [
            Seen(float(where), float(worst), float(again))
            for where, worst, again in zip(location[:, place], tail[:, place], control, strict=True)
        ]
        for name, place in ((name, arms.index(head)) for name, head in heads.items())
    }


def told_of(pairs: Sequence[Seen]) -> Counter[str]:
    """How often the gate tells what, of pairs of the traces in seeded random orders."""
    orders = (np.random.default_rng(number).permutation(len(pairs))[:28].tolist() for number in range(DRAWS))
    return Counter(verdict_of([pairs[place] for place in order]) for order in orders)


@pytest.mark.parametrize("arm", ["+5 %", "+10 %"])
def test_what_is_slower_on_the_traces_is_found(arm: str, traces: dict[str, list[Seen]]) -> None:
    told = told_of(traces[arm])

    assert told[PASS] == 0
    assert told[FAIL] >= 0.95 * DRAWS


def test_equals_on_the_traces_pass(traces: dict[str, list[Seen]]) -> None:
    told = told_of(traces["A/A"])

    assert told[FAIL] == 0
    assert told[PASS] >= 0.95 * DRAWS


def test_what_is_faster_on_the_traces_never_fails(traces: dict[str, list[Seen]]) -> None:
    told = told_of([Seen(-pair.location, -pair.tail, pair.control) for pair in traces["+5 %"]])

    assert told[FAIL] == 0
    assert told[PASS] > DRAWS / 2


@pytest.fixture(scope="module")
def trials() -> list[dict[str, Any]]:
    with gzip.open(DATA / "gate_trials.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def test_todays_rules_tell_of_the_trials_what_was_told_then(trials: list[dict[str, Any]]) -> None:
    for trial in trials:
        for name, found in trial["arms"].items():
            kept = [pair for attempt in found["attempts"] for pair in attempt["pairs"]]
            seen = [Seen(pair["location"], pair["tail"], pair["control"]) for pair in kept]
            assert verdict_of(seen) == found["verdict"], f"trial {trial['trial']}, {name}"


def test_the_error_rates_are_what_is_promised(trials: list[dict[str, Any]]) -> None:
    counted = rates(trials)

    def share(arm: str, verdict: str) -> float:
        flagged, of = counted[arm][f"lora-bench {verdict}"]
        assert of >= (300 if arm == EQUAL else 100)
        return flagged / of

    assert share(EQUAL, FAIL) <= 0.01
    assert share("+5 %", FAIL) >= 0.99
    assert share("+3 %", FAIL) >= 0.90
    assert share("-5 %", FAIL) == 0
    assert share(TAIL_ARM, FAIL) >= 0.90
    assert share(EQUAL, INCONCLUSIVE) <= 0.05


def test_other_gates_do_worse_on_the_same_samples(trials: list[dict[str, Any]]) -> None:
    """No gate on whole runs leaves equals alone and finds 3 per cent more."""
    counted = rates(trials)
    for gate in {gate for gate in counted[EQUAL] if not gate.startswith("lora-bench")}:
        (alarms, equals), (found, slower) = counted[EQUAL][gate], counted["+3 %"][gate]
        assert alarms / equals > 0.01 or found / slower < 0.90, gate


def test_what_the_file_holds_is_told_without_a_trial(
    trials: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed")
    path = tmp_path / "trials.jsonl"
    path.write_text("".join(json.dumps(trial) + "\n" for trial in trials[:3]))

    main(["--trials", "3", "--effects", "1", "--output", str(path)])

    firsts = [trial["arms"][EQUAL]["attempts"][0]["pairs"] for trial in trials[:3]]
    assert f"equals: {Counter(map(len, firsts))[7]} after 7" in capsys.readouterr().out
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize("wrong", [["--trials", "0"], ["--trials", "3", "--effects", "4"]])
def test_trials_that_cannot_be_meant_are_refused(wrong: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(wrong)


def test_the_table_tells_the_rates_with_their_intervals(trials: list[dict[str, Any]]) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed")

    lines = table(trials).splitlines()

    assert lines[0].count("|") == len(ARMS) + 2
    flagged, of = rates(trials)["+5 %"]["lora-bench FAIL"]
    (row,) = [line for line in lines if line.startswith("| lora-bench FAIL")]
    assert f"{100 * flagged / of:.1f} [" in row
