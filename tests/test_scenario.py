"""One planned row: when it is skipped, with the reason, and what is built to check it without measuring."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lora_bench import subjects
from lora_bench.bench import ready, scenario
from lora_bench.bench.scenario import Workshop, reason_to_skip
from lora_bench.bench.workload import BASE, Row, Workload
from lora_bench.reference import REFERENCE


def row(setup: str, phase: str = "decode", dtype: str = "fp32", subject: str = "planted") -> Row:
    return Row(subject, Workload(setup, phase, "micro", dtype, rank=4, batch=2, sequence=6))


UNPROVEN = "does not offer factors, without which its gradients cannot be proven"


@pytest.fixture
def skipped(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The reason to skip a row of the reference with some fields of its record changed."""

    def reason(of: Row, device: str = "cpu", **changes: Any) -> str | None:
        subject = replace(REFERENCE, name="planted", **changes)
        monkeypatch.setattr(subjects, "find", {"planted": subject}.__getitem__)
        return reason_to_skip(of, device)

    return reason


@pytest.mark.parametrize("setup", ["merged", "separate", "batched", "four_bit"])
@pytest.mark.parametrize("phase", ["prefill", "decode", "train"])
def test_what_offers_everything_is_not_skipped(skipped: Any, setup: str, phase: str) -> None:
    assert skipped(row(setup, phase)) is None
    assert skipped(row(setup, phase), "cuda:1") is None


@pytest.mark.parametrize(
    ("of", "device", "changes", "reason"),
    [
        (row("merged"), "cpu", {"merge": None}, None),
        (row("merged"), "cpu", {"merge_and_unload": None}, None),
        (row("merged"), "cpu", {"merge": None, "merge_and_unload": None}, "does not offer merge_and_unload or merge"),
        (row("separate"), "cpu", {"merge": None, "merge_and_unload": None, "pool": None}, None),
        (row("batched"), "cpu", {"pool": None}, "does not offer pool, route"),
        (row("batched"), "cpu", {"route": None}, "does not offer pool, route"),
        (row("batched"), "cpu", {"plan": None}, None),
        (row("merged", "switch"), "cpu", {"merge_and_unload": None}, None),
        (row("merged", "switch"), "cpu", {"unmerge": None}, "does not offer merge, unmerge"),
        (row("separate", "switch"), "cpu", {"merge": None, "unmerge": None}, None),
        (row("separate"), "cpu", {"factors": None}, None),
        (
            row("separate", "train"),
            "cpu",
            {"factors": None},
            UNPROVEN,
        ),
        (row("separate", dtype="bf16"), "cpu", {"dtypes": ("fp32", "fp16")}, "does not claim bf16"),
        (row("separate", dtype="fp16"), "cpu", {"dtypes": ("fp32", "fp16")}, None),
        (row("separate"), "cpu", {"supports": lambda spec: f"not {spec.scaling:g}"}, "does not offer rank 4: not 2"),
        (row("separate"), "cuda:1", {"devices": ("cpu",)}, "does not claim cuda:1"),
        (row("separate"), "cuda:1", {"devices": ("cuda",)}, None),
        (row("four_bit"), "cpu", {"layers": ("linear",)}, "takes no 4-bit base"),
        (row("separate"), "cpu", {"layers": ("linear",)}, None),
        (row("separate"), "cpu", {"layers": ("nf4",)}, "takes no dense base"),
        (row("four_bit"), "cpu", {"layers": ("nf4",)}, None),
        (row("four_bit", dtype="fp64"), "cpu", {"layers": ("linear", "nf4")}, None),
    ],
)
def test_what_is_not_offered_is_skipped_with_the_reason(
    skipped: Any, of: Row, device: str, changes: dict[str, Any], reason: str | None
) -> None:
    found = skipped(of, device, **changes)

    assert found == (reason and f"planted {reason}")


def test_what_bitsandbytes_cannot_quantise_or_is_not_there_for_is_skipped(
    skipped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear4bit = {"layers": ("linear", "linear4bit")}
    assert "not fp64" in skipped(row("four_bit", dtype="fp64"), **linear4bit)

    monkeypatch.setattr(scenario, "missing", lambda kind: f"no library for {kind}")
    assert skipped(row("four_bit"), **linear4bit) == "no library for linear4bit"
    assert skipped(row("separate"), **linear4bit) is None


def test_a_shipped_subject_without_its_library_is_skipped_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subjects, "find_spec", lambda _: None)

    assert reason_to_skip(row("separate", subject="peft"), "cpu") == "peft is not installed: pip install peft"
    assert reason_to_skip(row("separate", subject="reference"), "cpu") is None
    assert reason_to_skip(row("separate", subject=BASE), "cpu") is None


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is built, in order."""
    names: list[str] = []

    def note(name: str) -> None:
        original = getattr(ready, name)

        def build(*arguments: Any) -> Any:
            names.append(name)
            return original(*arguments)

        monkeypatch.setattr(ready, name, build)

    note("build_base")
    note("build")
    return names


def test_models_are_kept_as_long_as_the_next_row_needs_them(built: list[str]) -> None:
    workshop = Workshop("cpu")
    prefill, decode = (row("separate", phase, subject="reference") for phase in ("prefill", "decode"))
    for of in (prefill, decode, row("merged", subject="reference"), row("separate", "train", subject="reference")):
        workshop.prove(of)

    assert built == ["build_base", "build", "build", "build_base", "build"]


def test_a_base_that_was_trained_is_no_control_any_more(built: list[str]) -> None:
    workshop, training = Workshop("cpu"), row("separate", "train", subject="reference")
    for of in (training, training.base(), training):
        workshop.prove(of)

    assert built == ["build_base", "build", "build", "build_base", "build"]
