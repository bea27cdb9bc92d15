"""This run beside an earlier one: what is a regression, what passes, and what cannot be compared."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from lora_bench.bench.workload import BASE, Row, Workload
from lora_bench.gate.baseline import Line, closing, compare, exit_code, load

ROW = Row("mine", Workload("separate", "prefill", "micro", "fp32", rank=4, batch=2, sequence=8))
MIB = 2**20
OLD: dict[str, Any] = {
    "fingerprint": {"hard": {"device_name": "A", "torch": "2.13.0"}, "soft": {"os": "x"}},
    "memory": {
        "parameter_bytes": 100 * MIB,
        "allocated_peak_bytes": 200 * MIB,
        "saved_tensor_bytes": "unavailable (nothing is saved to infer)",
        "resident_peak_bytes": 300 * MIB,
        "attribution": "pid",
    },
    "ratio_to_base": {"median": 1.5, "low": 1.4, "high": 1.6, "confidence": 0.95},
}


def changed(path: str, value: object) -> dict[str, Any]:
    """A copy of OLD with another value at a dotted path."""
    info = copy.deepcopy(OLD)
    *parents, last = path.split(".")
    place = info
    for parent in parents:
        place = place[parent]
    place[last] = value
    return info


def ratio(median: float, low: float, high: float) -> dict[str, Any]:
    return changed("ratio_to_base", {"median": median, "low": low, "high": high, "confidence": 0.95})


CASES = {
    "equal": (OLD, OLD, "pass", 0, ""),
    "memory +0.4 %": (changed("memory.allocated_peak_bytes", int(200.8 * MIB)), OLD, "pass", 0, ""),
    "memory +0.6 %": (
        changed("memory.allocated_peak_bytes", int(201.2 * MIB)),
        OLD,
        "REGRESSION",
        1,
        "allocated_peak_bytes 209,715,200 -> 210,973,491 (+0.60%, limit 0.5%)",
    ),
    "parameters +0.6 %": (changed("memory.parameter_bytes", int(100.6 * MIB)), OLD, "REGRESSION", 1, "parameter_bytes"),
    "saved for backward +0.6 %": (
        changed("memory.saved_tensor_bytes", 1006),
        changed("memory.saved_tensor_bytes", 1000),
        "REGRESSION",
        1,
        "saved_tensor_bytes 1,000 -> 1,006",
    ),
    "less memory": (changed("memory.allocated_peak_bytes", 10), OLD, "pass", 0, ""),
    "from nothing to something": (OLD, changed("memory.allocated_peak_bytes", 0), "REGRESSION", 1, "+100.00%"),
    "nothing before and now": (
        changed("memory.allocated_peak_bytes", 0),
        changed("memory.allocated_peak_bytes", 0),
        "pass",
        0,
        "",
    ),
    "the resident set is too restless to compare": (
        changed("memory.resident_peak_bytes", 900 * MIB),
        OLD,
        "pass",
        0,
        "",
    ),
    "memory not told any more": (
        changed("memory.allocated_peak_bytes", "unavailable (x)"),
        OLD,
        "NOT COMPARABLE",
        6,
        "allocated_peak_bytes was 209715200, is unavailable (x)",
    ),
    "memory not told before": (
        OLD,
        changed("memory", {"attribution": "unavailable (oom)"}),
        "NOT COMPARABLE",
        6,
        "was None, is 209715200",
    ),
    "slower, apart": (
        ratio(1.65, 1.61, 1.7),
        OLD,
        "REGRESSION",
        1,
        "x base 1.500 [1.400, 1.600] -> 1.650 [1.610, 1.700] (+10.0%, limit 3%)",
    ),
    "slower, overlapping": (ratio(1.65, 1.59, 1.7), OLD, "pass", 0, ""),
    "slower, touching": (ratio(1.65, 1.6, 1.7), OLD, "pass", 0, ""),
    "slower, apart, but little": (ratio(1.53, 1.53, 1.53), ratio(1.5, 1.5, 1.5), "pass", 0, ""),
    "faster": (ratio(0.5, 0.4, 0.6), OLD, "pass", 0, ""),
    "another device": (
        changed("fingerprint.hard.device_name", "B"),
        OLD,
        "NOT COMPARABLE",
        6,
        "device_name was A, is B",
    ),
    "another torch": (
        changed("fingerprint.hard.torch", "2.14.0"),
        OLD,
        "NOT COMPARABLE",
        6,
        "torch was 2.13.0, is 2.14.0",
    ),
    "a driver only now": (
        changed("fingerprint.hard.driver", "580"),
        OLD,
        "NOT COMPARABLE",
        6,
        "driver was None, is 580",
    ),
    "no fingerprint before": (OLD, changed("fingerprint", {}), "NOT COMPARABLE", 6, "device_name was None, is A"),
    "another system": (changed("fingerprint.soft.os", "y"), OLD, "pass", 0, ""),
    "a regression on another device": (
        changed("fingerprint.hard.device_name", "B") | {"memory": {"allocated_peak_bytes": 900 * MIB}},
        OLD,
        "NOT COMPARABLE",
        6,
        "device_name",
    ),
    "no ratio now": (changed("ratio_to_base", None), OLD, "NOT COMPARABLE", 6, "no ratio to base in this run"),
    "no ratio before": (OLD, changed("ratio_to_base", None), "NOT COMPARABLE", 6, "no ratio to base in the baseline"),
    "a ratio without bounds": (ratio(9.0, float("-inf"), float("inf")), OLD, "NOT COMPARABLE", 6, "-inf"),
    "a ratio that is no number": (OLD, ratio(float("nan"), 1.4, 1.6), "NOT COMPARABLE", 6, "nan"),
    "a ratio of nothing": (OLD, ratio(0.0, 0.0, 0.0), "NOT COMPARABLE", 6, "0.0"),
}


@pytest.mark.parametrize(("new", "old", "verdict", "code", "text"), CASES.values(), ids=CASES.keys())
def test_verdict_and_exit_code(new: dict[str, Any], old: dict[str, Any], verdict: str, code: int, text: str) -> None:
    lines = compare({ROW: new}, {ROW: old})

    assert verdict in {line.verdict for line in lines} <= {verdict, "pass"}
    assert exit_code(lines) == code
    worst = [line for line in lines if line.verdict == verdict]
    assert any(text in line.text for line in worst), worst
    assert all(str(ROW) in str(line) for line in lines)


def test_everything_that_is_compared_has_a_line() -> None:
    assert [line.text.split()[0] for line in compare({ROW: OLD}, {ROW: OLD})] == [
        "allocated_peak_bytes",
        "parameter_bytes",
        "x",
    ]


def test_the_base_has_no_ratio_to_itself_but_its_memory_is_compared() -> None:
    new = changed("memory.parameter_bytes", 110 * MIB) | {"ratio_to_base": None}
    lines = compare({ROW.base(): new}, {ROW.base(): OLD})

    assert [line.verdict for line in lines] == ["pass", "REGRESSION"]


def test_a_row_of_one_run_alone_is_named() -> None:
    other = Row("other", ROW.workload)

    missing, new = compare({other: OLD}, {ROW: OLD})
    assert (missing.name, missing.verdict, missing.text) == (str(ROW), "NOT COMPARABLE", "missing from this run")
    assert (new.name, new.verdict, new.text) == (str(other), "NOT COMPARABLE", "not in the baseline")
    assert exit_code([missing, new]) == 6


def test_another_workload_is_another_row() -> None:
    wider = Row("mine", Workload(**ROW.workload.as_dict() | {"rank": 8}))

    assert exit_code(compare({wider: OLD}, {ROW: OLD})) == 6


def test_nothing_compared_is_no_pass() -> None:
    assert exit_code(compare({}, {})) == 6


def test_a_regression_outweighs_what_cannot_be_compared() -> None:
    new = {ROW: ratio(3.0, 2.9, 3.1), ROW.base(): OLD}

    assert exit_code(compare(new, {ROW: OLD})) == 1


def document(*infos: dict[str, Any]) -> str:
    return json.dumps({"benchmarks": [{"name": "n", "extra_info": info} for info in infos]})


OURS = OLD | {"subject": ROW.subject, "workload": ROW.workload.as_dict()}


def test_our_rows_are_read_and_benchmarks_of_others_passed_over(tmp_path: Path) -> None:
    base = OURS | {"subject": BASE, "workload": ROW.base().workload.as_dict()}
    (tmp_path / "old.json").write_text(document(OURS, {"something": "else"}, {}, base))

    assert load(tmp_path / "old.json") == {ROW: OLD, ROW.base(): OLD}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "--lora-baseline: there is no file .*old.json"),
        (b"", "old.json is no JSON of --benchmark-json: JSONDecodeError"),
        (b"\xff\xfe\x00", "old.json is no JSON of --benchmark-json: UnicodeDecodeError"),
        (b"[1, 2]", "old.json is no JSON of --benchmark-json: TypeError"),
        (b"null", "old.json is no JSON of --benchmark-json: TypeError"),
        (b"{}", "old.json is no JSON of --benchmark-json: KeyError: 'benchmarks'"),
        (b'{"benchmarks": {"a": 1}}', "old.json is no JSON of --benchmark-json: TypeError"),
        (b'{"benchmarks": [{}]}', "old.json is no JSON of --benchmark-json: KeyError: 'extra_info'"),
        (b'{"benchmarks": []}', "old.json holds no result of the GPU suites"),
        (document({"something": "else"}).encode(), "old.json holds no result of the GPU suites"),
        (document(OURS)[:-9].encode(), "old.json is no JSON of --benchmark-json: JSONDecodeError"),
        (document(OURS | {"workload": {"setup": "separate"}}).encode(), "TypeError: .* missing"),
        (
            document(OURS | {"workload": ROW.workload.as_dict() | {"rank": 0}}).encode(),
            "rank must be at least 1, got 0",
        ),
        (document({name: OURS[name] for name in OURS if name != "memory"}).encode(), "KeyError: 'memory'"),
        (document({name: OURS[name] for name in OURS if name != "subject"}).encode(), "KeyError: 'subject'"),
    ],
)
def test_a_file_that_is_no_baseline_is_refused_by_name(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "old.json").write_bytes(content)

    with pytest.raises(ValueError, match=message):
        load(tmp_path / "old.json")


def test_a_folder_is_no_baseline(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no JSON of --benchmark-json: IsADirectoryError"):
        load(tmp_path)


def test_a_comparison_closes_with_its_counts_and_its_rule() -> None:
    lines = [Line("a", verdict, "") for verdict in ("pass", "pass", "REGRESSION", "NOT COMPARABLE")]

    assert closing(lines).startswith("2 passed, 1 regressed, 1 not comparable. Memory may rise by 0.5%")
