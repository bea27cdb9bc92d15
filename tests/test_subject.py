"""The record that an implementer fills in: what it takes, what it refuses, what it offers."""

import re
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from lora_bench.reference import REFERENCE
from lora_bench.spec import LoraSpec
from lora_bench.subject import CONTRACT, KNOWN, VERBS, Known, Subject
from tests.expected import exactly

OPTIONAL = tuple(verb for verb in VERBS if verb not in ("wrap", "load", "supports"))


def nothing(*_: Any) -> None: ...


def test_a_subject_is_a_name_and_two_functions() -> None:
    subject = Subject("acme", nothing, nothing)

    assert str(subject) == "acme"
    assert subject.offers("wrap", "load", "supports")
    assert not any(subject.offers(verb) for verb in OPTIONAL)
    assert subject.supports(LoraSpec(2, 1, rslora=True)) is None
    assert (subject.dtypes, subject.devices, subject.layers) == (
        ("fp64", "fp32", "bf16", "fp16"),
        ("cpu", "cuda"),
        ("linear",),
    )


@pytest.mark.parametrize("verb", OPTIONAL)
def test_a_verb_is_offered_when_it_is_there(verb: str) -> None:
    verbs: dict[str, Any] = {verb: nothing}
    subject = Subject("acme", nothing, nothing, **verbs)

    assert subject.offers(verb)
    assert subject.offers("wrap", verb)
    assert subject.offers()
    for other in set(OPTIONAL) - {verb}:
        assert not subject.offers(other)
        assert not subject.offers(verb, other)


def test_verbs_are_all_the_functions() -> None:
    assert {field.name for field in fields(Subject)} == {"name", *VERBS, *KNOWN, "residual", "known", "contract"}
    assert REFERENCE.offers("wrap", "load", "supports", "merge", "unmerge", "route", "state")


def test_a_verb_that_cannot_be_called_with_its_arguments_is_refused() -> None:
    message = "acme: merge is called as (layer), and takes (): too many positional arguments"
    with pytest.raises(TypeError, match=exactly(message)):
        Subject("acme", nothing, nothing, merge=lambda: None)  # type: ignore[misc, arg-type]
    message = (
        "acme: wrap is called as (base, spec), and takes (base, spec, device): missing a required argument: 'device'"
    )
    with pytest.raises(TypeError, match=exactly(message)):
        Subject("acme", lambda base, spec, device: None, nothing)  # type: ignore[misc, arg-type]


def test_a_verb_may_take_more_by_default_and_a_builtin_may_not_say_what_it_takes() -> None:
    def wrap(base: Any, spec: LoraSpec, device: str = "cpu") -> None: ...

    assert Subject("acme", wrap, nothing, state=dict, merge=type).offers("merge")


def test_a_known_failure_has_a_reason_and_a_case() -> None:
    with pytest.raises(ValueError, match="a known failure needs its because, got ''"):
        Known("", "t1 i1 o1 r1 a1 fp64 s0")
    with pytest.raises(ValueError, match="a known failure needs its case, got ''"):
        Known("by design", "")
    with pytest.raises(TypeError, match=r"acme: known\['merge.twice_is_once'\] must be a Known, got 'by design'"):
        Subject("acme", nothing, nothing, known={"merge.twice_is_once": "by design"})  # type: ignore[dict-item]


@pytest.mark.parametrize("contract", [0, CONTRACT + 1])
def test_a_contract_is_one_that_there_is(contract: int) -> None:
    with pytest.raises(ValueError, match=f"acme: contract must be in 1..{CONTRACT}, got {contract}"):
        Subject("acme", nothing, nothing, contract=contract)


@pytest.mark.parametrize("typo", ["merges", "unload", "Factors", "dtype", "layer"])
def test_a_typo_in_a_field_is_refused(typo: str) -> None:
    misnamed: dict[str, Any] = {typo: nothing}
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{typo}'"):
        Subject("acme", nothing, nothing, **misnamed)


def test_optional_verbs_are_given_by_name() -> None:
    with pytest.raises(TypeError, match="positional argument"):
        Subject("acme", nothing, nothing, nothing)  # type: ignore[call-arg, arg-type]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"name": ""}, ValueError, "a subject needs a name, got ''"),
        ({"wrap": None}, TypeError, "acme: wrap must be a function, got None"),
        ({"load": "load"}, TypeError, "acme: load must be a function, got 'load'"),
        ({"supports": None}, TypeError, "acme: supports must be a function, got None"),
        ({"merge": True}, TypeError, "acme: merge must be a function, got True"),
        ({"plan": 3}, TypeError, "acme: plan must be a function, got 3"),
        ({"dtypes": ()}, ValueError, "acme: dtypes must be a tuple of fp64, fp32, bf16, fp16, got ()"),
        ({"dtypes": "fp32"}, ValueError, "acme: dtypes must be a tuple of fp64, fp32, bf16, fp16, got 'fp32'"),
        ({"dtypes": ["fp32"]}, ValueError, "acme: dtypes must be a tuple of fp64, fp32, bf16, fp16, got ['fp32']"),
        ({"devices": ("gpu",)}, ValueError, "acme: devices must be a tuple of cpu, cuda, got ('gpu',)"),
        (
            {"layers": ("linear", "conv")},
            ValueError,
            "acme: layers must be a tuple of linear, fan_in_fan_out, embedding, ",
        ),
    ],
)
def test_a_subject_that_cannot_be_is_refused(values: dict[str, Any], error: type[Exception], message: str) -> None:
    usual: dict[str, Any] = {"name": "acme", "wrap": nothing, "load": nothing}
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        Subject(**(usual | values))


def test_a_subject_does_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        Subject("acme", nothing, nothing).name = "other"  # type: ignore[misc]
