"""The reference conforms to the checks; and how a verdict is reached and reads."""

from __future__ import annotations

import itertools
from dataclasses import replace
from textwrap import dedent
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import strategies as st

from lora_bench import REFERENCE, Case, Subject
from lora_bench.bounds import Deviation
from lora_bench.conformance import (
    CHECKS,
    Check,
    Docket,
    Nonconformance,
    Verdict,
    find_check,
    judge,
    judge_all,
    summary,
)
from lora_bench.conformance.trial import Trial
from lora_bench.conformance.zoo import SPECIMENS
from lora_bench.conformance.zoo.planting import bug, computing, correct
from lora_bench.reference import LoraLinear

if TYPE_CHECKING:
    from torch import Tensor

DEFINED = find_check("forward.matches_definition")
CASE = Case(tokens=1, d_in=2, d_out=1, rank=1, alpha=1.0)
NOT_OFFERED = {
    "lora_bias.merged_bias_is_scaled@nf4": (
        "merge: a 4-bit base cannot hold W + s B A; merge_and_unload gives a dense layer"
    ),
    "attention.acts_in_an_encoder@multihead_attention": (
        "not inside an nn.TransformerEncoderLayer: 'LoraAttention' object has no attribute 'batch_first'"
    ),
    "attention.dropout_acts@multihead_attention": ("wrap: dropout, DoRA and lora_bias are not offered here"),
}


def planted(name: str) -> Subject:
    """The specimen of that name."""
    (subject,) = (specimen.subject for specimen in SPECIMENS if str(specimen) == name)
    return subject


def test_every_check_comes_after_a_check_that_is_there() -> None:
    assert {check.after for check in CHECKS if check.after} <= {check.id for check in CHECKS}


@pytest.mark.parametrize("check", [check for check in CHECKS if check.kind in REFERENCE.layers], ids=str)
def test_the_reference_conforms(check: Check) -> None:
    verdict = judge(REFERENCE, check, examples=15)

    assert verdict.status in ("conforms", "not_offered"), str(verdict)
    assert verdict.status == "conforms" or check.id in NOT_OFFERED


def test_what_the_reference_does_not_offer_has_a_reason() -> None:
    told = {name: judge(REFERENCE, find_check(name), examples=3).because for name in NOT_OFFERED}

    assert {name: because.partition(", got LoraSpec")[0] for name, because in told.items()} == NOT_OFFERED


def test_the_smallest_case_is_found_and_told() -> None:
    """A transpose forgotten in square layers alone shows in nothing smaller than 2 x 2."""
    verdict = judge(planted("merge.equals_definition: transposed where square"), find_check("merge.equals_definition"))

    assert str(verdict.case) == "t1 i2 o2 r1 a1 fp64 s0"
    assert verdict.deviation is not None
    assert verdict.deviation.ratio > 1e9


MEASURED = Verdict(
    "acme",
    DEFINED,
    "fails",
    CASE,
    "y",
    Deviation((0, 0), 1.96402, 0.755922, 1.208098, 2.31e-15),
    address="acme.py:ACME",
    resembles="`scale_is_alpha` (alpha is not divided, residual 0e+00)",
)


def test_a_failure_says_what_was_found_wanted_and_allowed_and_how_to_replay_it() -> None:
    message = """\
        acme does not conform: forward.matches_definition
          claim      The output is W x + b + s B A x.
          case       t1 i2 o1 r1 a1 fp64 s0
          scaling    s = alpha / r = 1
          found      y[0,0] = 1.96402, wanted 0.755922
          error      1.21e+00, allowed 2.31e-15  (x5.2e+14)
          resembles  `scale_is_alpha` (alpha is not divided, residual 0e+00)
          replay     lora-bench replay acme.py:ACME forward.matches_definition 't1 i2 o1 r1 a1 fp64 s0'
        """
    assert str(Nonconformance(MEASURED)) == dedent(message).strip()


def test_values_that_differ_late_are_told_apart_and_what_must_be_equal_has_no_ratio() -> None:
    close = replace(
        MEASURED, tensor="x", deviation=Deviation((), 1.0, 1 + 2**-30, 2**-30, 0.0), address="", resembles=""
    )
    message = """\
        acme does not conform: forward.matches_definition
          claim      The output is W x + b + s B A x.
          case       t1 i2 o1 r1 a1 fp64 s0
          scaling    s = alpha / r = 1
          found      x = 1, wanted 1.0000000009313226
          error      9.31e-10, must be equal
          replay     lora-bench replay acme forward.matches_definition 't1 i2 o1 r1 a1 fp64 s0'
        """
    assert str(close) == dedent(message).strip()


def test_an_exception_of_the_subject_is_a_failure_that_shows_its_type_and_text() -> None:
    message = """\
        acme does not conform: forward.matches_definition
          claim      The output is W x + b + s B A x.
          case       t1 i1 o1 r1 a1 fp64 s0
          scaling    s = alpha / r = 1
          because    forward raised ZeroDivisionError: division by zero
          replay     lora-bench replay acme forward.matches_definition 't1 i1 o1 r1 a1 fp64 s0'
        """
    assert str(judge(computing(lambda _layer, _x: 1 / 0), DEFINED)) == dedent(message).strip()


def test_an_exception_of_a_check_is_not_laid_to_the_subject() -> None:
    broken = replace(DEFINED, run=lambda trial: {}[trial.layer()])

    verdict = judge(REFERENCE, broken)

    assert verdict.status == "error"
    assert str(verdict).startswith("lora-bench could not judge reference: forward.matches_definition\n")
    assert "KeyError: LoraLinear(" in verdict.because
    assert "test_conformance.py:" in verdict.because


def test_a_subject_that_fails_now_and_then_fails() -> None:
    turns = itertools.cycle([False, True, False])

    verdict = judge(computing(lambda layer, x: correct(layer, x) + next(turns)), DEFINED)

    assert verdict.status == "fails"
    assert verdict.because == "and not every time: the same case has also not failed"


@pytest.mark.parametrize(
    ("subject", "because"),
    [
        (bug(merge=None), "no merge"),
        (bug(merge=None, unmerge=None), "no merge and unmerge"),
        (bug(layers=("nf4",)), "no linear base layer"),
        (bug(devices=("cuda",)), "no cpu"),
        (bug(supports=lambda _spec: "not on Sundays"), "not on Sundays"),
    ],
)
def test_what_is_not_offered_is_said(subject: Subject, because: str) -> None:
    verdict = judge(subject, find_check("merge.unmerge_restores"))

    assert (verdict.status, verdict.because) == ("not_offered", because)


class Function(NamedTuple):
    """A layer that can only be called."""

    layer: LoraLinear

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_a_layer_need_not_be_a_torch_module() -> None:
    subject = Subject(
        "acme", lambda *given: Function(LoraLinear(*given)), lambda self, factors: self.layer.load(factors)
    )
    verdict = judge(subject, find_check("training.only_factors_train"))

    assert judge(subject, DEFINED).status == "conforms"
    assert (verdict.status, verdict.because) == ("not_offered", "the layer is no torch module")


def test_a_check_keeps_to_the_dtypes_and_specs_that_are_offered() -> None:
    seen = set()

    def noting(trial: Trial) -> None:
        trial.layer()
        seen.add((trial.case.dtype, trial.spec.rslora))

    narrow = bug(dtypes=("bf16", "fp32"), supports=lambda spec: "no rsLoRA" if spec.rslora else None)
    assert judge(narrow, replace(DEFINED, run=noting)).status == "conforms"
    assert seen == {("bf16", False), ("fp32", False)}
    assert judge(narrow, find_check("training.gradcheck")).because == "no fp64"


@pytest.mark.parametrize("subject", [REFERENCE, planted("forward.matches_definition: the adapter is dropped")], ids=str)
def test_an_effect_below_the_rounding_is_inconclusive(subject: Subject) -> None:
    faint = replace(DEFINED, draws={"dtype": st.just("bf16"), "gain": st.just(1e-6), "alpha": st.just(1.0)})

    verdict = judge(subject, faint)

    assert (verdict.status, verdict.because) == ("inconclusive", "the whole effect is within the bound")


def test_overflow_of_a_narrow_dtype_is_inconclusive() -> None:
    huge = replace(DEFINED, draws={"dtype": st.just("fp16"), "gain": st.just(1e4), "alpha": st.just(1e4)})

    assert judge(REFERENCE, huge).because == "fp16 overflows"


def test_one_cause_is_one_failure() -> None:
    subject = planted("forward.matches_definition: the scale is alpha")

    verdicts = {verdict.check.id: verdict for verdict in judge_all(subject, examples=10)}

    failed = [name for name, verdict in verdicts.items() if verdict.failed and "@" not in name]
    # A bias of B, a scale and a mixed batch have checks of their own, which build on no other.
    assert failed[0] == "forward.matches_definition"
    assert {name.partition(".")[0] for name in failed[1:]} <= {
        "lora_bias",
        "adapters",
        "batch",
        "dora",
        "model",
        "attention",
    }
    assert verdicts["merge.keeps_bias"].because == "forward.matches_definition does not hold"
    assert verdicts["merge.equals_separate"].status == "blocked"
    assert verdicts["merge.equals_separate"].because == "forward.matches_definition does not hold"


def test_what_is_not_offered_blocks_nothing() -> None:
    verdict = Docket(bug(factors=None), examples=5).verdict(find_check("training.gradcheck"))

    assert verdict.status == "conforms"


def test_the_summary_counts_and_says_what_was_not_judged() -> None:
    def verdict(status: str, because: str = "", subject: str = "acme") -> Verdict:
        return Verdict(subject, DEFINED, status, because=because)  # type: ignore[arg-type]

    found = [
        *[verdict("conforms")] * 3,
        verdict("fails"),
        verdict("error"),
        verdict("inconclusive", "too faint"),
        verdict("blocked", "x does not hold"),
        *[verdict("not_offered", "no pool and route")] * 2,
        verdict("not_offered", "no merge"),
        verdict("conforms", subject="other"),
    ]

    assert summary(found) == (
        "lora_bench: acme 3 of 10 checks conform, 1 fail, 1 could not be judged, 1 inconclusive (too faint), "
        "1 blocked (x does not hold), 3 not offered (no pool, route, merge)\n"
        "lora_bench: other 1 of 1 checks conform, 0 fail"
    )


def test_typing_errors_in_a_check_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"forward.matches_definition: needs must be among wrap, .* got mrege"):
        replace(DEFINED, needs=("mrege",))
    with pytest.raises(ValueError, match=r"bases must be among linear, .*, int4, got conv$"):
        replace(DEFINED, bases=("conv",))
    with pytest.raises(
        ValueError, match=r"no check is called 'merge.equals_seperate'; the nearest are merge.equals_separate"
    ):
        find_check("merge.equals_seperate")
