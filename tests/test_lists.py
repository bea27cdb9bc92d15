"""The lists that dashboards read."""

from __future__ import annotations

import csv
from typing import Any

from lora_bench.bench.result import Result
from lora_bench.bench.workload import BASE, Row
from lora_bench.report.lists import bencher, bigger, machine, otava, smaller, texts
from lora_bench.report.run import Run
from tests.micro_rows import row
from tests.scripted_workers import samples

DECODE, SWITCH, FAILED = row("a", "merged", "decode"), row("a", "merged", "switch"), row("b", "merged", "decode")
HARD = {"device_name": "A GPU", "driver": "580", "ecc": None}


def result(of: Row, **fields: Any) -> Result:
    return Result(of, samples(0.25)._replace(seconds=[0.1, 0.2, 0.25, 0.25, 0.25, 0.3, 0.4]), **fields)


def run(*results: Result) -> Run:
    return Run("r", "cuda", {each.row: each for each in results}, fingerprint={"hard": HARD})


RUN = run(
    result(
        DECODE,
        memory={"allocated_peak_bytes": 512, "resident_peak_bytes": 9},
        energy={"joules_per_step": 3.5, "validity": "verified"},
    ),
    result(SWITCH, memory={"allocated_peak_bytes": "unavailable (x)"}, energy={"joules_per_step": "unavailable (x)"}),
    Result(FAILED, kind="oom", failure="oom: none left"),
)
EXTRA = "A GPU: driver 580, ecc None"


def test_smaller_is_better_of_seconds_bytes_and_joules() -> None:
    assert smaller(RUN) == [
        {"name": f"{DECODE} seconds", "unit": "s", "value": 0.25, "range": "[0.1, 0.4]", "extra": EXTRA},
        {"name": f"{DECODE} peak", "unit": "bytes", "value": 512, "extra": EXTRA},
        {"name": f"{DECODE} energy", "unit": "J", "value": 3.5, "extra": EXTRA},
        {"name": f"{SWITCH} seconds", "unit": "s", "value": 0.25, "range": "[0.1, 0.4]", "extra": EXTRA},
    ]


def test_bigger_is_better_of_tokens_and_a_switch_reads_none() -> None:
    assert bigger(RUN) == [
        {"name": f"{DECODE} throughput", "unit": "tokens/s", "value": 8.0, "range": "[5, 20]", "extra": EXTRA}
    ]


def test_joules_that_are_not_believed_are_left_out() -> None:
    doubted = run(result(DECODE, energy={"joules_per_step": 3.5, "validity": "invalid: a window of 1 s"}))

    assert [each["unit"] for each in smaller(doubted)] == ["s"]


def test_an_interval_without_ends_is_left_out() -> None:
    few = run(Result(DECODE, samples(0.25)._replace(seconds=[0.25], turns=[0], interrupted=[False])))

    assert "range" not in smaller(few)[0]
    assert "range" not in bigger(few)[0]
    assert bencher(few)[str(DECODE)]["seconds"] == {"value": 0.25}


def test_bencher_has_a_benchmark_for_each_row_and_a_measure_for_each_quantity() -> None:
    found = bencher(RUN)

    assert found[str(DECODE)] == {
        "seconds": {"value": 0.25, "lower_value": 0.1, "upper_value": 0.4},
        "throughput": {"value": 8.0, "lower_value": 5.0, "upper_value": 20.0},
        "peak": {"value": 512},
        "energy": {"value": 3.5},
    }
    assert found.keys() == {str(DECODE), str(SWITCH)}


def test_otava_has_a_line_for_the_run_with_a_column_for_each_figure() -> None:
    ((time, commit, *names), (when, sha, *values)) = csv.reader(otava(RUN, "2026-01-02", "abc").splitlines())

    assert (time, commit, when, sha) == ("time", "commit", "2026-01-02", "abc")
    assert dict(zip(names, values, strict=True))[f"{DECODE} energy"] == "3.5"
    assert len(names) == 5


def test_the_time_and_the_commit_are_the_run_s() -> None:
    told = Run("r", results=RUN.results, origin={"time": "2026-01-02", "git": {"sha": "abc", "dirty": False}})

    assert texts(told)["otava.csv"]().splitlines()[1].startswith("2026-01-02,abc,")
    assert texts(RUN)["otava.csv"]().splitlines()[1].startswith(",,")


def test_a_machine_that_is_not_known_is_its_device() -> None:
    assert machine(Run("r", "cpu")) == "cpu: "
    assert smaller(run(Result(DECODE))) == []
    assert BASE not in str(smaller(RUN))
