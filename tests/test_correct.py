"""Nothing correct is accused: every style of `lora_bench.conformance.correct` conforms, in whatever it offers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_bench.case import Case
from lora_bench.conformance import correct, judge_case
from lora_bench.conformance.catalogue import checks_for, find_check
from lora_bench.conformance.check import DENSE
from lora_bench.conformance.correct import CORRECT
from lora_bench.conformance.correct.gradients import Manual
from lora_bench.conformance.correct.products import Balanced
from lora_bench.conformance.verdict import Verdict
from lora_bench.subject import KNOWN, VERBS, Subject
from tests.imported_modules import imported

EAGER = [name for name in CORRECT if name != "compiled"]  # every shape costs a compiled one seconds
KINDS = [(name, kind) for name in EAGER for kind in CORRECT[name].layers]
# As many cases per check as the profile's share: three in CI, and a night's worth at night.
SHARE = settings(max_examples=settings.default.max_examples // 16, phases=(Phase.generate,))  # type: ignore[union-attr]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_correct_implementation_conforms(name: str, kind: str) -> None:
    subject = CORRECT[name]
    checks = [check for check in checks_for(subject) if check.kind == kind and subject.offers(*check.needs)]
    verdicts: list[Verdict] = []

    # All checks' cases from one draw: what is not offered then costs no search for a case in which it is.
    @SHARE
    @given(st.data())
    def judged(data: st.DataObject) -> None:
        verdicts.extend(judge_case(subject, check, data.draw(check.cases)) for check in checks)

    judged()

    assert "\n".join(str(verdict) for verdict in verdicts if verdict.failed) == ""
    assert any(verdict.status == "conforms" for verdict in verdicts)


@pytest.mark.parametrize("claim", ["forward.matches_definition", "training.gradients_match_formulas"])
def test_a_compiled_one_conforms(claim: str) -> None:
    case = Case(tokens=3, d_in=5, d_out=4, rank=2, dtype="fp32", bias=True)

    verdict = judge_case(CORRECT["compiled"], find_check(claim), case)

    assert verdict.status == "conforms", str(verdict)


def test_they_are_ten_and_more_and_named_as_they_are_found() -> None:
    assert len(CORRECT) >= 10
    assert all(name == subject.name for name, subject in CORRECT.items())


def test_every_verb_of_a_layer_is_offered_in_more_than_one_way() -> None:
    of_models = {"adapt", "save", "restore"}
    ways = {verb: [name for name in CORRECT if CORRECT[name].offers(verb)] for verb in VERBS.keys() - of_models}

    assert {verb: names for verb, names in ways.items() if len(names) < 2 and verb != "plan"} == {}
    assert all(len(ways[verb]) >= 3 for verb in ("pool", "add", "merge_adapters", "combine", "load_state"))
    assert all(sum(kind in CORRECT[name].layers for name in CORRECT) >= 2 for kind in DENSE)


def test_none_has_code_of_the_reference() -> None:
    for path in Path(correct.__file__).parent.glob("*.py"):
        modules = imported(path.read_text(encoding="utf-8"))

        assert not [module for module in modules if module.startswith("lora_bench.reference")], path.name


class Louder(Balanced):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + 2 * (super().forward(x) - self.base(x))
        return y


class Deaf(Manual):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


@pytest.mark.parametrize(
    ("subject", "claim"),
    [
        (replace(CORRECT["balanced"], wrap=Louder), "forward.matches_definition"),
        (replace(CORRECT["handwritten"], wrap=Deaf), "training.gradients_match_formulas"),
        (
            replace(CORRECT["transposed"], route=lambda layer, *given: layer.linear(given[1])),
            "batch.rows_equal_single_rows",
        ),
    ],
    ids=str,
)
def test_the_same_styles_with_a_fault_are_accused(subject: Subject, claim: str) -> None:
    case = Case(adapters=2) if claim.startswith("batch") else Case()

    assert judge_case(subject, find_check(claim), case).status == "fails"


def test_the_layouts_are_those_that_they_are_named_for() -> None:
    base = torch.nn.Linear(5, 4)
    wrapped = {name: CORRECT[name].wrap(torch.nn.Linear(5, 4), Case(rank=2).spec) for name in CORRECT}

    assert wrapped["transposed"].in_proj.shape == (5, 2)
    assert not wrapped["windowed"].lora_A.is_contiguous()
    assert not wrapped["windowed"](torch.ones(3, 5)).is_contiguous()
    assert not isinstance(wrapped["functional"], torch.nn.Module)
    assert type(wrapped["hooked"]) is type(base)
    assert torch.nn.utils.parametrize.is_parametrized(wrapped["parametrised"], "weight")
    assert wrapped["upcast"].to(torch.bfloat16) is wrapped["upcast"]


def test_every_variant_is_computed_by_one_that_is_right() -> None:
    assert {variant for subject in CORRECT.values() for variant in subject.variants} == set(KNOWN["variants"])
