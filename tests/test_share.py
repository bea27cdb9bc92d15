"""Verdicts that other processes reach."""

import os
import signal
from dataclasses import replace
from typing import Any

import pytest

from lora_bench.conformance import Docket, find_check
from lora_bench.conformance.check import Check
from lora_bench.conformance.share import sharing
from lora_bench.conformance.verdict import Verdict
from lora_bench.conformance.zoo.planting import bug

CLAIMS = ("forward.matches_definition", "forward.keeps_dtype")
CHECKS = [find_check(claim + kind) for claim in CLAIMS for kind in ("", "@embedding", "@conv1d")]


def conforming(check: Check) -> Verdict:
    return Verdict(f"process {os.getpid()}", check, "conforms")


def test_the_kinds_of_base_layer_are_judged_elsewhere_and_each_by_one_process() -> None:
    with sharing("subject", CHECKS, conforming) as judged:
        verdicts = [judged(check) for check in CHECKS]

    assert [verdict.check for verdict in verdicts] == CHECKS
    processes = {(verdict.check.kind, verdict.subject) for verdict in verdicts}
    assert len(processes) == 3
    assert f"process {os.getpid()}" not in {process for _, process in processes}


def test_a_subject_that_ends_the_process_fails_the_check_in_hand() -> None:
    def judge(check: Check) -> Verdict:
        if check is CHECKS[1]:
            os.kill(os.getpid(), signal.SIGKILL)
        return conforming(check)

    with sharing("subject", CHECKS, judge) as judged:
        found = {check.id: judged(check) for check in CHECKS}

    assert found["forward.matches_definition"].status == "conforms"
    ended = found["forward.matches_definition@embedding"]
    assert (ended.status, ended.because) == ("fails", "the process that judged it was ended by SIGKILL")
    after = found["forward.keeps_dtype@embedding"]
    assert (after.status, after.because) == ("blocked", "forward.matches_definition@embedding ended the process")


def test_what_several_processes_find_is_told_once_and_in_order() -> None:
    def wrap(_base: Any, _spec: Any) -> Any:
        raise RuntimeError("no layer today")

    subject = replace(bug(wrap=wrap), layers=("linear", "embedding"))
    verdicts = list(Docket(subject, examples=2).verdicts())

    assert [verdict.check.id for verdict in verdicts if verdict.failed] == ["forward.matches_definition"]
    embedding = next(verdict for verdict in verdicts if verdict.check.id == "forward.matches_definition@embedding")
    assert embedding.because == "wrap raises the same in forward.matches_definition"


def test_an_exit_is_told_with_its_code(capfd: pytest.CaptureFixture[str]) -> None:
    def judge(_check: Check) -> Verdict:
        os._exit(3)

    with sharing("subject", CHECKS[:1], judge) as judged:
        verdict = judged(CHECKS[0])

    assert verdict.because == "the process that judged it ended with exit code 3"
    assert capfd.readouterr().err == ""
