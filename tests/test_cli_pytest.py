"""The checks as pytest tests, found by the plug-in or written by an implementer."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from lora_bench import subjects
from lora_bench.conformance import CHECKS
from tests.plug_in import PLUG_IN, WRONG

pytest_plugins = ["pytester"]
UNKNOWN = (
    "forward.dropout_only_in_training",
    *("lora_bias.matches_definition", "lora_bias.trains"),
    *("dora.is_identity", "dora.matches_definition", "dora.trains"),
)
"""What it says that it does not offer, besides verbs."""
LINEAR = [check for check in CHECKS if check.kind == "linear"]


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest_inprocess("-p", "lora_bench.plugin", "-p", "no:cacheprovider", "-rs", *arguments)


def test_a_plug_in_is_judged_by_its_path(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(acme=PLUG_IN)
    result = run(pytester, "--pyargs", "lora_bench.conformance", "--lora-subject", "acme.py:ACME", "-vv")

    outcomes = result.parseoutcomes()
    assert outcomes.keys() == {"passed", "skipped"}
    assert sum(outcomes.values()) == len(LINEAR)
    assert outcomes["passed"] >= sum(not check.needs for check in LINEAR) - len(UNKNOWN)
    result.stdout.fnmatch_lines(
        ["*test_conforms?acme-forward.matches_definition?*PASSED*", "SKIPPED*: not offered: no pool and route"]
    )


def test_a_failure_is_its_message_and_shows_none_of_our_code(pytester: pytest.Pytester) -> None:
    test = "\nfrom lora_bench import conforms\n@conforms(ACME)\ndef test_acme(check):\n    check()\n"
    pytester.makepyfile(test_acme=WRONG + test)
    result = run(pytester, "-k", "forward.matches_definition or merge.equals")

    result.assert_outcomes(failed=1, skipped=2)
    result.stdout.fnmatch_lines(
        [
            ">*check()",
            "E * lora_bench.Nonconformance: acme does not conform: forward.matches_definition",
            "E * claim      The output is W x + b + s B A x.",
            "E * resembles  `adapter_is_applied_twice`*",
            "E * saved *.lora_bench/failures/acme/forward.matches_definition",
            "E * replay     lora-bench replay test_acme.py:ACME forward.matches_definition 't1 i1 o1 r1 a1 fp64 s0'",
        ]
    )
    result.stdout.no_fnmatch_line("*collect.py*Nonconformance*")
    result.stdout.no_fnmatch_line("*judge.py*")


def test_the_suite_of_shipped_subjects_says_what_to_install(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subjects, "missing", lambda name: None if name == "reference" else f"pip install {name}")
    suite = Path(__file__).parent.parent / "suites" / "conformance"
    result = run(pytester, str(suite), "-k", "leaves_input_untouched or (peft and not model) or loralib")

    result.assert_outcomes(passed=1, skipped=2)
    result.stdout.fnmatch_lines(["SKIPPED*pip install peft", "SKIPPED*pip install loralib"])


def test_junit_says_what_was_found(pytester: pytest.Pytester) -> None:
    test = "\nfrom lora_bench import conforms\n@conforms(ACME)\ndef test_acme(check):\n    check()\n"
    pytester.makepyfile(test_acme=WRONG + test)
    result = run(
        pytester, "-k", "forward.matches_definition or keeps_dtype", "--junitxml=out.xml", "--lora-output=kept"
    )
    cases = ET.parse(pytester.path / "out.xml").iter("testcase")  # noqa: S314  # pytest wrote it just now
    told = {case.get("name"): {each.get("name"): each.get("value") for each in case.iter("property")} for case in cases}

    assert result.ret == 1
    failed = told["test_acme[forward.matches_definition]"]
    assert failed["lora_verdict"] == "fails"
    assert failed["lora_case"] == "t1 i1 o1 r1 a1 fp64 s0"
    assert str(failed["lora_resembles"]).startswith("`adapter_is_applied_twice`")
    assert str(failed["lora_replay"]).startswith("lora-bench replay test_acme.py:ACME forward.matches_definition")
    assert told["test_acme[merge.keeps_dtype]"]["lora_because"] == "forward.matches_definition does not hold"
    assert (pytester.path / "kept" / "failures" / "acme" / "forward.matches_definition" / "verdict.txt").is_file()


def test_the_limits_of_a_run_are_options(pytester: pytest.Pytester) -> None:
    hanging = PLUG_IN.replace("return self.base(x)", "import time; time.sleep(600); return self.base(x)")
    pytester.makepyfile(acme=hanging)
    result = run(
        pytester,
        "--pyargs",
        "lora_bench.conformance",
        "--lora-subject=acme.py:ACME",
        "--lora-timeout=2",
        "-k",
        "forward.",
    )

    result.stdout.fnmatch_lines(["*because    forward did not return within 2 s"])
    assert result.parseoutcomes()["failed"] == 1


@pytest.mark.parametrize("option", ["--lora-examples=0", "--lora-timeout=-1"])
def test_a_wrong_limit_is_a_usage_error(pytester: pytest.Pytester, option: str) -> None:
    assert run(pytester, option).ret == pytest.ExitCode.USAGE_ERROR
