"""What a verdict is reached on: plug-ins that are broken, that hang, and failures that are known."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_bench import REFERENCE, Case, LoraSpec, Subject
from lora_bench.adapter import read
from lora_bench.conformance import CHECKS, Docket, find_check, judge, judge_case
from lora_bench.conformance.catalogue import checks_for
from lora_bench.conformance.limit import limited
from lora_bench.conformance.outcome import TimeIsUp
from lora_bench.conformance.zoo.planting import bug, computing, correct, delta
from lora_bench.reference import LoraLinear, wrap
from lora_bench.subject import CONTRACT, Known

DEFINED = find_check("forward.matches_definition")
SMALLEST = "t1 i1 o1 r1 a1 fp64 s0"


def endless(*_: Any) -> None:
    while True:
        time.sleep(0.001)


def stubborn(*_: Any) -> None:
    """Swallows whatever interrupts it, for a while."""
    for _again in range(3):
        try:
            time.sleep(60)
        except BaseException:  # noqa: BLE001, S112  # that is the point
            continue
    time.sleep(60)


# Broken plug-ins


@pytest.mark.parametrize(
    ("subject", "because"),
    [
        (bug(wrap=lambda _base, _spec: None), "wrap returned None, wanted a layer that can be called"),
        (bug(wrap=lambda _base, _spec: 3), "wrap returned 3, wanted a layer that can be called"),
        (bug(wrap=lambda _base, _spec: 1 / 0), "wrap raised ZeroDivisionError: division by zero"),
        (bug(wrap=lambda _base, _spec: sys.exit(3)), "wrap raised SystemExit: 3"),
        (bug(load=lambda _layer, _factors: dict[str, int]()["a"]), "load raised KeyError: 'a'"),
        (computing(lambda _layer, _x: None), "the output is a NoneType, not a tensor"),
        (computing(lambda layer, x: correct(layer, x)[:, :0]), "y is of shape (1, 0), wanted (1, 1)"),
        (
            computing(lambda _layer, _x: (_ for _ in ()).throw(NotImplementedError)),
            "forward raised NotImplementedError: ",
        ),
    ],
)
def test_a_broken_plug_in_is_told_what_is_wrong_and_where(subject: Subject, because: str) -> None:
    verdict = judge(subject, DEFINED)

    assert (verdict.status, verdict.because, str(verdict.case)) == ("fails", because, SMALLEST)


def test_a_wrong_dtype_is_told() -> None:
    verdict = judge(computing(lambda layer, x: correct(layer, x).half()), find_check("forward.keeps_dtype"))

    assert verdict.because == "y is torch.float16, wanted torch.float64"


def test_what_goes_wrong_in_every_check_is_one_failure() -> None:
    docket = Docket(replace(bug(wrap=lambda _base, _spec: None), layers=("linear",)), examples=3)
    verdicts = [
        docket.verdict(check) for check in docket.checks if "adapt" not in check.needs and "restore" not in check.needs
    ]
    misuse = [
        verdict for verdict in verdicts if verdict.status not in ("blocked", "not_offered") and not verdict.failed
    ]

    assert [verdict.check.id for verdict in verdicts if verdict.failed] == ["forward.matches_definition"]
    assert not misuse
    same = next(verdict for verdict in verdicts if verdict.check.id == "forward.keeps_dtype")
    assert same.because == "wrap raises the same in forward.matches_definition"


def test_a_verb_that_is_not_implemented_is_not_offered() -> None:
    def later(_layer: Any) -> None:
        raise NotImplementedError("next year")

    verdict = judge(bug(merge=later), find_check("merge.equals_definition"))

    assert (verdict.status, verdict.because) == ("not_offered", "merge: next year")


# Hanging


@pytest.mark.parametrize("hang", [endless, stubborn])
def test_a_verb_that_hangs_is_cut_off_and_the_other_checks_go_on(hang: Any) -> None:
    subject = replace(bug(merge=hang), layers=("linear",))
    docket = Docket(subject, examples=3, seconds=2)
    began = time.monotonic()
    hung = docket.verdict(find_check("merge.equals_definition"))

    assert time.monotonic() - began < 30
    assert (hung.status, hung.verb, hung.hung) == ("fails", "merge", True)
    assert hung.because == "merge did not return within 2 s"
    assert docket.verdict(find_check("merge.keeps_dtype")).because == "merge.equals_definition does not hold"
    lora_bias = docket.verdict(find_check("lora_bias.merged_bias_is_scaled"))
    assert (lora_bias.status, lora_bias.because) == ("blocked", "merge hung in merge.equals_definition")
    assert docket.verdict(find_check("forward.disabled_is_base")).status == "conforms"


def test_where_wrap_hangs_nothing_else_is_tried() -> None:
    docket = Docket(replace(bug(wrap=endless), layers=("linear",)), examples=3, seconds=2)
    began = time.monotonic()
    verdicts = [
        docket.verdict(check) for check in docket.checks if "adapt" not in check.needs and "restore" not in check.needs
    ]

    assert time.monotonic() - began < 30
    assert [verdict.check.id for verdict in verdicts if verdict.failed] == ["forward.matches_definition"]


def test_a_limit_of_nothing_is_no_limit_and_a_block_in_time_is_left_alone() -> None:
    with limited(0):
        time.sleep(0.01)
    with limited(10):
        pass
    with pytest.raises(TimeIsUp), limited(0.01):
        time.sleep(5)
    time.sleep(0.05)


# Known failures


WRONG = computing(lambda layer, x: correct(layer, x) + (delta(layer, x) if layer.spec.rslora else 0))
RSLORA = Known("rsLoRA is scaled twice", f"{SMALLEST} rslora", where=lambda case: case.rslora)


def knowing(**known: Known) -> Subject:
    return replace(WRONG, known={name.replace("__", "."): entry for name, entry in known.items()})


def test_a_known_failure_is_no_failure_while_it_happens() -> None:
    verdict = judge(knowing(forward__matches_definition=RSLORA), DEFINED)

    assert (verdict.status, verdict.failed, verdict.because) == ("known", False, "rsLoRA is scaled twice")
    assert verdict.cases > 10


def test_with_no_place_given_only_its_case_is_judged() -> None:
    verdict = judge(knowing(forward__matches_definition=replace(RSLORA, where=None)), DEFINED)

    assert (verdict.status, str(verdict.case), verdict.cases) == ("known", f"{SMALLEST} rslora", 0)


def test_outside_of_its_place_a_failure_is_one() -> None:
    entry = Known("in squares alone", f"{SMALLEST} rslora", where=lambda case: case.rslora and case.d_in == case.d_out)
    verdict = judge(knowing(forward__matches_definition=entry), DEFINED)

    assert verdict.status == "fails"
    assert verdict.case is not None
    assert verdict.case.d_in != verdict.case.d_out


def test_a_known_failure_that_does_not_happen_fails() -> None:
    verdict = judge(knowing(forward__matches_definition=replace(RSLORA, case=SMALLEST)), DEFINED)

    assert verdict.status == "fails"
    assert verdict.because == (
        "it is said to be known to fail in this case (rsLoRA is scaled twice), where it holds: "
        "correct or remove the entry in `known`"
    )


def test_the_cases_of_a_known_failure_are_left_out_of_what_builds_on_it() -> None:
    assert (
        judge(knowing(forward__matches_definition=RSLORA), find_check("state.survives_deepcopy")).status == "conforms"
    )
    assert judge(WRONG, find_check("state.survives_deepcopy")).status == "fails"


def test_where_every_case_is_known_nothing_can_be_told() -> None:
    everywhere = replace(RSLORA, where=lambda _case: True)
    verdict = judge(knowing(forward__matches_definition=everywhere), find_check("forward.keeps_dtype"))

    assert (verdict.status, verdict.because) == ("inconclusive", "no case is left beside the known failures")


def test_a_known_failure_of_a_check_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no check is called 'merge.thrice'; the nearest are merge\."):
        Docket(knowing(merge__thrice=RSLORA))


def test_a_check_newer_than_the_contract_is_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = replace(DEFINED)
    object.__setattr__(newer, "since", CONTRACT + 1)
    verdict = judge(WRONG, newer)

    assert (verdict.status, verdict.failed) == ("advice", False)
    assert judge(REFERENCE, newer).status == "conforms"


# Kinds


def test_a_subject_is_judged_on_the_kinds_that_it_takes() -> None:
    checks = checks_for(replace(REFERENCE, layers=("linear", "conv1d")))

    assert {check.kind for check in checks} == {"linear", "conv1d"}
    assert [check for check in CHECKS if check.kind in ("linear", "conv1d")] == list(checks)


def test_a_case_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"forward.matches_definition is about a base of kind linear, got .* conv1d"):
        judge_case(REFERENCE, DEFINED, Case.parse(f"{SMALLEST} conv1d"))


@pytest.mark.parametrize("kind", ["fan_in_fan_out", "embedding", "conv1d", "conv2d", "conv3d", "nf4"])
def test_a_wrong_scale_is_found_on_every_kind(kind: str) -> None:
    def doubled(base: nn.Module, spec: LoraSpec) -> LoraLinear:
        return wrap(base, replace(spec, alpha=2 * spec.alpha))  # type: ignore[return-value]

    theme = "four_bit" if kind == "nf4" else "forward"
    verdict = judge(bug(wrap=doubled), find_check(f"{theme}.matches_definition@{kind}"))

    assert verdict.status == "fails", str(verdict)
    assert verdict.resembles.startswith("`adapter_is_applied_twice`")


# The operations of a sequence


def test_a_failing_sequence_is_as_short_as_it_can_be() -> None:
    def off_for_good(layer: Any, enabled: bool) -> None:
        layer.enable(enabled and layer.enabled)

    verdict = judge(bug(enable=off_for_good), find_check("lifecycle.any_order"))

    assert verdict.case is not None
    assert verdict.case.ops == ("off", "on")
    assert verdict.tensor == "y after off, on: y"


# What is kept


def test_the_smallest_failing_adapter_is_saved_in_peft_s_format(tmp_path: Path) -> None:
    docket = Docket(WRONG, examples=10, output=tmp_path)
    verdict = docket.verdict(DEFINED)
    folder = tmp_path / "failures" / "acme" / "forward.matches_definition"

    assert verdict.saved == str(folder)
    assert f"  saved      {folder}\n" in str(verdict)
    assert verdict.case is not None
    spec, factors = verdict.case.draw().adapters[0]
    saved = read(folder).modules["layer"]
    assert saved.spec == spec
    assert torch.equal(saved.factors.a, factors.a)
    assert torch.equal(saved.factors.b, factors.b)
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "case.safetensors",
        "verdict.txt",
    ]


@pytest.mark.parametrize("case", ["n2", "conv2d kernel2 groups2 i2 o2 r2", "embedding", "fan_in_fan_out", "lora_bias"])
def test_any_case_can_be_saved(case: str, tmp_path: Path) -> None:
    from lora_bench.conformance.keep import keep

    verdict = replace(judge_case(REFERENCE, DEFINED, Case()), case=Case.parse(case))

    assert read(keep(verdict, tmp_path)).modules["layer"].factors.a.shape[0] == Case.parse(case).rank


# What may not be told, and what must


def test_an_output_that_is_no_number_fails_where_nothing_overflows() -> None:
    verdict = judge(computing(lambda layer, x: correct(layer, x) * math.nan), DEFINED)

    assert (verdict.status, str(verdict.case)) == ("fails", SMALLEST)


def test_a_finite_output_is_judged_also_where_others_overflow() -> None:
    case = Case.parse("t1 i1 o1 r1 a30000 fp16 s0 g4")
    verdict = judge_case(computing(lambda layer, x: torch.zeros_like(correct(layer, x))), DEFINED, case)

    assert verdict.status == "fails"


def test_a_fresh_layer_is_its_base_whether_or_not_it_tells_its_factors() -> None:
    assert judge(bug(factors=None), find_check("init.is_identity"), examples=5).status == "conforms"


@pytest.mark.parametrize("ops", ["merge,load", "merge,off"])
def test_what_a_merged_layer_computes_with_new_factors_or_switched_off_is_its_own_affair(ops: str) -> None:
    subject = bug(load=lambda layer, factors: None if layer.merged else layer.load(factors))
    subject = replace(subject, enable=lambda layer, enabled: None if layer.merged else layer.enable(enabled))
    case = Case.parse(f"t1 i1 o1 r1 a1 fp64 s0 n2 ops={ops}")

    assert judge_case(subject, find_check("lifecycle.any_order"), case).status == "conforms"
