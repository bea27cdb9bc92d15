"""The GPU suites with --benchmark: samples, records, the table, and a run beside an earlier one."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_bench.bench.workload import Row, Workload
from tests.planted_subjects import PLANTED
from tests.pytest_runs import GPU, SMALL, Run, run


@dataclass
class Measured:
    run: Run
    document: dict[str, Any]
    path: Path
    records: list[dict[str, Any]]


def measure(folder: Path, *arguments: str) -> Measured:
    path, output = folder / "out.json", folder / "records"
    options = (f"--benchmark-json={path}", f"--benchmark-storage={folder / 'store'}", f"--lora-output={output}")
    found = run(*SMALL, "--benchmark", "--lora-seconds=0.1", *options, *arguments)
    (records,) = output.glob("*.jsonl")
    return Measured(found, json.loads(path.read_text()), path, list(map(json.loads, records.read_text().splitlines())))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return measure(tmp_path_factory.mktemp("measured"), GPU, "--lora-subject=reference", "--benchmark-save=kept")


def place(of: dict[str, Any]) -> Row:
    return Row(of["subject"], Workload(**of["workload"]))


def test_a_measured_run_passes_and_prints_its_progress_and_its_table(measured: Measured) -> None:
    text = measured.run.text

    assert measured.run.code == 0
    assert measured.run.outcomes == {"passed": 15}
    for phrase in (
        "building and proving 8 arms of micro",
        "reference four_bit r4 is right: 28 checks",
        "timing decode: 5 rows taking turns",
        "memory of reference merged r4, in a process of its own",
        "\ndecode: micro fp32, batch 2 x 8 tokens, device=cpu\n",
        "\nswitch: micro fp32, to other adapters, device=cpu\n",
        "\ntrain: micro fp32, batch 2 x 8 tokens, device=cpu\n",
        "\nfull ",
        "\nrecords: ",
    ):
        assert phrase in text
    assert "Name (time in" not in text  # pytest-benchmark's own table says less


def test_raw_samples_reach_the_json_bit_for_bit(measured: Measured) -> None:
    benchmarks = {place(benchmark["extra_info"]): benchmark for benchmark in measured.document["benchmarks"]}
    latencies = {place(record): record for record in measured.records if record["quantity"] == "latency"}

    assert len(benchmarks) == 15
    assert benchmarks.keys() == latencies.keys()
    for row, benchmark in benchmarks.items():
        assert benchmark["stats"]["data"] == latencies[row]["samples_seconds"]
        assert 10 <= len(benchmark["stats"]["data"]) <= 700
        assert benchmark["group"] == row.workload.phase
        info = benchmark["extra_info"]
        assert info["memory"]["parameter_bytes"] > 0
        assert info["memory"]["resident_peak_bytes"]
        assert info["device"] == "cpu"
        assert info["fingerprint"]["hard"]["torch"] == torch.__version__
        assert (info["ratio_to_base"]["median"] == 1) == (row.subject == "base")
        assert info["proof"] is None or info["proof"]["error_ratio"] <= 1


def test_a_saved_run_keeps_its_raw_samples(measured: Measured) -> None:
    (saved,) = (measured.path.parent / "store").rglob("0001_kept.json")
    kept = {benchmark["name"]: benchmark["stats"]["data"] for benchmark in json.loads(saved.read_text())["benchmarks"]}

    assert kept == {benchmark["name"]: benchmark["stats"]["data"] for benchmark in measured.document["benchmarks"]}


def test_every_row_has_one_record_of_latency_and_one_of_memory(measured: Measured) -> None:
    plan, ceilings, *results = measured.records
    counts = Counter((place(record), record["quantity"]) for record in results)

    assert [plan["quantity"], ceilings["quantity"]] == ["plan", "ceilings"]
    assert {place(row) for row in plan["rows"]} == {row for row, _ in counts}

    assert len(counts) == 30
    assert set(counts.values()) == {1}
    assert {quantity for _, quantity in counts} == {"latency", "memory"}
    assert {record["device"] for record in measured.records} == {"cpu"}
    assert {record["fingerprint"]["hard"]["device"] for record in [ceilings, *results]} == {"cpu"}
    assert len({record["run_id"] for record in measured.records}) == 1


@pytest.fixture
def baseline(measured: Measured, tmp_path: Path) -> Path:
    """The measured run's file with nothing but decoding with a separate adapter."""
    rows = measured.document["benchmarks"]
    chosen = [row for row in rows if row["name"].startswith("test_separate[reference-decode-")]
    (tmp_path / "baseline.json").write_text(json.dumps({"benchmarks": chosen}))
    return tmp_path / "baseline.json"


def test_a_run_beside_itself_is_a_pass_or_a_named_regression(
    baseline: Path, measured: Measured, tmp_path: Path
) -> None:
    store = measured.path.parent / "store"
    options = ("-k", "reference-decode", "--lora-subject=reference", f"--lora-baseline={baseline}", "-p", "no:capture")
    compare = ("--benchmark-compare=0001", f"--benchmark-storage={store}")
    found = measure(tmp_path, "suites/gpu/test_separate.py", *options, *compare).run
    lines = found.text.partition(f"against {baseline}")[2].splitlines()
    verdicts = [line for line in lines if " separate[reference-decode-micro-fp32-r4-b2-s8]: " in line]

    assert [line.partition("]: ")[2].split()[0] for line in verdicts] == ["parameter_bytes", "x"]
    assert "NOT COMPARABLE" not in found.text
    assert "test_separate[reference-decode-micro-fp32-r4-b2-s8] (0001_kept)" in found.text
    assert verdicts[0].startswith("pass ")
    # Its ratio of 10 samples of a millisecond may be off on a busy machine: then it is called so.
    codes = {"pass": 0, "improved": 0, "REGRESSION": 1, "INCONCLUSIVE": 6}
    assert found.code == codes[verdicts[1].split()[0]]


def test_collecting_beside_a_baseline_judges_nothing(baseline: Path, tmp_path: Path) -> None:
    options = ("--benchmark", f"--lora-baseline={baseline}", f"--lora-output={tmp_path / 'out'}")
    found = run(GPU, *SMALL, "--collect-only", *options)

    assert found.code == 0
    assert "NOT COMPARABLE" not in found.text


def test_a_baseline_that_nothing_was_compared_with_is_no_pass(baseline: Path, tmp_path: Path) -> None:
    options = ("--benchmark", f"--lora-baseline={baseline}", f"--lora-output={tmp_path / 'out'}")
    found = run("tests/test_workload.py", "-k", "json", *options)

    assert found.outcomes == {"passed": 1}
    assert found.code == 6
    assert "NOT COMPARABLE separate[reference-decode-micro-fp32-r4-b2-s8]: missing from this run" in found.text


def test_a_wrong_subject_fails_its_row_shortly_and_costs_no_other(tmp_path: Path) -> None:
    chosen = (f"--lora-subject={PLANTED}:DROPPED", "--lora-subject=reference", "--lora-subject=loralib")
    found = measure(tmp_path, "suites/gpu/test_separate.py", "suites/gpu/test_batched.py", "-k", "decode", *chosen)
    (wrong,) = (report for report in found.run.reports.values() if report.outcome == "failed")
    (skipped,) = (report for report in found.run.reports.values() if report.outcome == "skipped")

    assert found.run.code == 1
    assert found.run.outcomes == {"passed": 4, "failed": 1, "skipped": 1}
    assert wrong.nodeid.endswith("test_separate[DROPPED-decode-micro-fp32-r4-b2-s8]")
    assert re.fullmatch(
        rf"separate\[{PLANTED}:DROPPED-decode-\S+\]\n  Wrong: model\.layers\.0\.self_attn\.q_proj: found .*",
        str(wrong.longrepr),
    )
    assert "Traceback" not in found.run.text
    assert re.search(r"^separate +\S+ +4 +wrong$", found.run.text, re.MULTILINE)
    assert skipped.nodeid.endswith("test_batched[loralib-decode-micro-fp32-r4-b2-s8-n2]")
    assert "Skipped: loralib does not offer pool, route" in str(skipped.longrepr)
    assert [record["kind"] for record in found.records if record["quantity"] == "failure"] == ["wrong"]
