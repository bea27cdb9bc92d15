"""The checks can fail: each is tripped by a planted bug, and each bug by the checks that it names."""

from __future__ import annotations

import pytest

from lora_bench import REFERENCE
from lora_bench.conformance import CHECKS, find_check, judge, judge_case
from lora_bench.conformance.selftest import Hunt, hunt, idle, named, summary
from lora_bench.conformance.zoo import SPECIMENS, Specimen


@pytest.mark.parametrize("specimen", SPECIMENS, ids=str)
def test_a_planted_bug_trips_the_checks_that_it_names(specimen: Specimen) -> None:
    """On the first kind of base layer; `lora-bench selftest` goes through all."""
    for claim in specimen.kills:
        check = next(check for check in named(specimen) if check.id.partition("@")[0] == claim)
        verdict = judge(specimen.subject, check, explain=False)

        assert verdict.status == "fails", str(verdict)
        assert verdict.case is not None
        assert judge_case(specimen.subject, check, verdict.case).status == "fails"


def test_there_are_many_bugs_and_no_two_of_one_name() -> None:
    assert len({str(specimen) for specimen in SPECIMENS}) == len(SPECIMENS) >= 80


def test_every_check_is_named_by_a_specimen_and_every_specimen_names_checks() -> None:
    claims = {check.id.partition("@")[0] for check in CHECKS}

    assert all(specimen.kills for specimen in SPECIMENS)
    assert {claim for specimen in SPECIMENS for claim in specimen.kills} == claims


def test_a_hunt_is_told() -> None:
    specimen = next(specimen for specimen in SPECIMENS if str(specimen) == "forward.keeps_dtype: fp32 comes out")
    hunts = list(hunt([specimen], examples=20))

    assert all(each.killed for each in hunts)
    assert {each.verdict.check.id for each in hunts} == {check.id for check in named(specimen)}
    assert "forward.keeps_dtype" not in idle(hunts)
    assert "forward.matches_definition" in idle(hunts)
    told = summary(hunts, [])
    assert "planted bugs: 1 of 1 found by the checks that they name (100.0%)" in told
    assert "false alarms: 0 in 0 cases on 0 correct implementations" in told


def test_a_survivor_is_told() -> None:
    check = find_check("forward.keeps_dtype")
    survivor = Hunt(
        Specimen("forward.keeps_dtype: none", SPECIMENS[0].subject, (check.id,)), judge(REFERENCE, check, examples=3)
    )

    assert not survivor.killed
    assert str(survivor) == "forward.keeps_dtype does not find `forward.keeps_dtype: none`: conforms"
    assert "planted bugs: 0 of 1 found by the checks that they name (0.0%)" in summary([survivor], [])
