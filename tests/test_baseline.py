"""This run beside an earlier one: what is a regression, what passes, and what cannot be compared."""

from __future__ import annotations

from typing import Any

import pytest

from lora_bench.bench.clocks import USUAL
from lora_bench.bench.workload import Row, Workload
from lora_bench.gate.baseline import Line, also_changed, closing, compare, exit_code, verdict_on, worst
from lora_bench.gate.figures import Run, trouble
from tests.made_figures import MIB, OLD, ROW, changed, ratio, run

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
    "memory -0.4 %": (changed("memory.allocated_peak_bytes", int(199.2 * MIB)), OLD, "pass", 0, ""),
    "memory -0.6 %": (
        changed("memory.allocated_peak_bytes", int(198.8 * MIB)),
        OLD,
        "improved",
        0,
        "(-0.60%, limit 0.5%): promote",
    ),
    "from nothing to something": (
        OLD,
        changed("memory.allocated_peak_bytes", 0),
        "NOT COMPARABLE",
        6,
        "bytes was 0, is",
    ),
    "less than nothing": (changed("memory.parameter_bytes", -5), OLD, "NOT COMPARABLE", 6, "was 104857600, is -5"),
    "memory that is no number": (changed("memory.parameter_bytes", True), OLD, "NOT COMPARABLE", 6, "is True"),
    "nothing before and now": (
        changed("memory.allocated_peak_bytes", 0),
        changed("memory.allocated_peak_bytes", 0),
        "NOT COMPARABLE",
        6,
        "allocated_peak_bytes was 0, is 0",
    ),
    "no memory before or now": (
        changed("memory", {"resident_peak_bytes": 9}),
        changed("memory", {}),
        "NOT COMPARABLE",
        6,
        "no memory was measured, now or before",
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
        "x base 1.500 [1.400, 1.600] -> 1.650 [1.610, 1.700] (+10.0%, limit 3.0%)",
    ),
    "slower, overlapping": (ratio(1.65, 1.59, 1.7), OLD, "INCONCLUSIVE", 6, "(+10.0%, limit 3.0%): measure again"),
    "slower, touching": (ratio(1.65, 1.6, 1.7), OLD, "INCONCLUSIVE", 6, "measure again"),
    "hardly slower, overlapping": (ratio(1.54, 1.45, 1.7), OLD, "pass", 0, ""),
    "slower, apart, but little": (ratio(1.53, 1.53, 1.53), ratio(1.5, 1.5, 1.5), "pass", 0, ""),
    "faster, apart": (ratio(0.5, 0.4, 0.6), OLD, "improved", 0, "(-66.7%, limit 3.0%): promote"),
    "faster, overlapping": (ratio(1.3, 1.2, 1.45), OLD, "pass", 0, ""),
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
    "a ratio of nothing": (OLD, ratio(0.0, 0.0, 0.0), "NOT COMPARABLE", 6, "a ratio to base of 0.000"),
    "no samples now": (changed("seconds", []), OLD, "NOT COMPARABLE", 6, "this run: no samples"),
    "no samples before": (OLD, changed("seconds", []), "NOT COMPARABLE", 6, "the baseline: no samples"),
    "a sample that is no number": (changed("seconds", [1.0, float("nan")]), OLD, "NOT COMPARABLE", 6, "of nan s"),
    "a sample of nothing": (OLD, changed("seconds", [1.0, 0.0]), "NOT COMPARABLE", 6, "the baseline: a sample of 0 s"),
    "a sample without end": (changed("seconds", [float("inf")]), OLD, "NOT COMPARABLE", 6, "this run: a sample of inf"),
    "throttled now": (
        changed("window", {"throttled": True, "throttle_delta": {"thermal": 5, "power": 0, USUAL: 7}}),
        OLD,
        "NOT COMPARABLE",
        6,
        "this run: the clock was throttled (thermal)",
    ),
    "throttled before": (OLD, changed("window", {"throttled": True}), "NOT COMPARABLE", 6, "the baseline: the clock"),
    "not known whether throttled": (changed("window", {"throttled": "unavailable (x)"}), OLD, "pass", 0, ""),
    "throttled, and more memory": (
        changed("window", {"throttled": True}) | {"memory": OLD["memory"] | {"allocated_peak_bytes": 300 * MIB}},
        OLD,
        "REGRESSION",
        1,
        "allocated_peak_bytes",
    ),
    "failed": (changed("seconds", []) | {"memory": {}}, OLD, "NOT COMPARABLE", 6, "this run: no samples"),
}


@pytest.mark.parametrize(("new", "old", "verdict", "code", "text"), CASES.values(), ids=CASES.keys())
def test_verdict_and_exit_code(new: dict[str, Any], old: dict[str, Any], verdict: str, code: int, text: str) -> None:
    lines = compare(run(new), [run(old)])

    assert worst(lines) == verdict
    assert exit_code(lines) == code
    assert any(text in line.text for line in lines if line.verdict == verdict), lines
    assert verdict_on(ROW, run(new), [run(old)]) == verdict


def test_everything_that_is_compared_has_a_line() -> None:
    assert [line.text.split()[0] for line in compare(run(OLD), [run(OLD)])] == [
        "allocated_peak_bytes",
        "parameter_bytes",
        "x",
    ]


def test_another_machine_is_said_once_with_every_field() -> None:
    elsewhere = changed("fingerprint.hard", {"device_name": "B", "torch": "2.14.0"})
    (line,) = compare(run(elsewhere, ROW, ROW.base()), [run(OLD, ROW, ROW.base())])

    assert line.name == "no baseline of this machine, the nearest is old"
    assert line.text == "device_name was A, is B; torch was 2.13.0, is 2.14.0"


def test_what_may_differ_is_told_and_costs_nothing() -> None:
    newer = changed("fingerprint.soft", {"os": "y", "packages": {"peft": "2", "triton": None}})
    old = changed("fingerprint.soft", {"os": "x", "packages": {"peft": "1", "triton": None}})

    assert also_changed(run(newer), run(old)) == ["os x -> y", "peft 1 -> 2"]
    assert worst(compare(run(newer), [run(old)])) == "pass"


def test_the_base_has_no_ratio_to_itself_but_its_memory_is_compared() -> None:
    new = changed("memory.parameter_bytes", 110 * MIB) | {"ratio_to_base": None}
    lines = compare(run(new, ROW.base()), [run(OLD, ROW.base())])

    assert [line.verdict for line in lines] == ["pass", "REGRESSION"]


def test_a_throttled_base_is_no_pass() -> None:
    lines = compare(run(changed("window", {"throttled": True}), ROW.base()), [run(OLD, ROW.base())])

    assert exit_code(lines) == 6


def test_a_clock_that_only_keeps_to_the_power_limit_is_no_trouble_in_an_older_record() -> None:
    def told(**moved: int) -> str:
        return trouble([1.0], [1.0], {"throttled": True, "throttle_delta": moved})

    assert told(software_power_cap_ns=5, thermal_ns=0) == ""
    assert told(software_power_cap_ns=5, software_thermal_ns=1) == "the clock was throttled (software_thermal_ns)"
    assert told() == "the clock was throttled (no reason told)"


def test_ratios_that_came_about_otherwise_are_not_compared() -> None:
    apart = run(OLD | {"interleaved": False})
    lines = compare(apart, [run(OLD), apart])

    assert [(line.verdict, line.text) for line in lines if line.verdict != "pass"] == [
        (
            "NOT COMPARABLE",
            "the base ran before and after the row, and in the baseline base and row took turns",
        )
    ]
    assert "and in the baseline the base ran" in str(compare(run(OLD), [apart])[-1])
    assert {line.verdict for line in compare(apart, [apart])} == {"pass"}


def test_a_row_of_one_run_alone_is_named() -> None:
    other = Row("other", ROW.workload)
    missing, new = compare(run(OLD, other), [run(OLD)])

    assert (missing.name, missing.verdict, missing.text) == (str(ROW), "NOT COMPARABLE", "missing from this run")
    assert (new.name, new.verdict, new.text) == (str(other), "NOT COMPARABLE", "not in the baseline")
    assert exit_code([missing, new]) == exit_code([missing, new], lenient=True) == 6
    assert verdict_on(other, run(OLD, other), [run(OLD)]) == "NOT COMPARABLE"


def test_another_workload_is_another_row() -> None:
    wider = Row("mine", Workload(**ROW.workload.as_dict() | {"rank": 8}))

    assert exit_code(compare(run(OLD, wider), [run(OLD)])) == 6


def test_nothing_compared_is_no_pass() -> None:
    nothing = Run("", {}, (), {})

    assert compare(nothing, [nothing]) == []
    assert exit_code([]) == exit_code([], lenient=True) == 6
    assert worst([]) == verdict_on(ROW, run(OLD), []) == "NOT COMPARABLE"
    assert [line.text for line in compare(nothing, [run(OLD)])] == ["missing from this run"]


def verdicts(*of: str) -> list[Line]:
    return [Line("a", verdict, "") for verdict in of]


@pytest.mark.parametrize(
    ("lines", "code", "lenient"),
    [
        (verdicts("pass"), 0, 0),
        (verdicts("improved"), 0, 0),
        (verdicts("pass", "INCONCLUSIVE"), 6, 0),
        (verdicts("pass", "NOT COMPARABLE"), 6, 0),
        (verdicts("INCONCLUSIVE"), 6, 6),
        (verdicts("NOT COMPARABLE"), 6, 6),
        (verdicts("pass", "REGRESSION", "NOT COMPARABLE"), 1, 1),
    ],
)
def test_what_is_lenient_passes_where_something_passed(lines: list[Line], code: int, lenient: int) -> None:
    assert (exit_code(lines), exit_code(lines, lenient=True)) == (code, lenient)


def test_a_comparison_closes_with_its_counts_and_its_rule() -> None:
    lines = verdicts("pass", "pass", "REGRESSION", "NOT COMPARABLE")

    assert closing(lines).startswith("2 pass, 1 NOT COMPARABLE, 1 REGRESSION. Memory may rise by 0.5%")
    assert closing([]).startswith("nothing was compared. ")
