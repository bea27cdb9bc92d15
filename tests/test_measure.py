"""The two jobs of a worker: rows that take turns, and peak memory; what fails costs its own rows alone."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from lora_bench.bench import measure, ready, turns
from lora_bench.bench.arm import Arm, build_arm
from lora_bench.bench.counts import Ceilings
from lora_bench.bench.nvml import GpuLost
from lora_bench.bench.proof import Unproven, Wrong
from lora_bench.bench.sampling import LEAST_ROUNDS, Samples
from lora_bench.bench.turns import Progress, Refusal, Timing
from lora_bench.bench.workload import BASE, Row
from tests.faulty_subjects import FAULTY
from tests.micro_rows import row, with_bases
from tests.planted_subjects import PLANTED

CEILINGS = Ceilings(1.0, 2.0)


@pytest.fixture(autouse=True)
def ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known ones: to measure them takes a second."""
    monkeypatch.setattr(measure, "measure_ceilings", reached)


def reached(device: str, dtype: torch.dtype) -> Ceilings:
    assert (device, dtype) == ("cpu", torch.float32)
    return CEILINGS


def compared(*rows: Row) -> list[Any]:
    return list(measure.compare(with_bases(*rows), "cpu", 0.0))


def of_type(kind: type, messages: list[Any]) -> list[Any]:
    return [message for message in messages if isinstance(message, kind)]


# --- compare --------------------------------------------------------------------------------------------------------


def test_rows_are_proven_and_then_timed_round_by_round_beside_their_base() -> None:
    rows = [
        row("reference", "separate", "prefill"),
        row("reference", "separate", "decode"),
        row("reference", "merged", "decode"),
    ]
    fingerprint, ceilings, *messages = compared(*rows)
    timings = {timing.row: timing for timing in of_type(Timing, messages)}

    assert fingerprint["hard"]["device"] == "cpu"
    assert ceilings == CEILINGS
    assert not of_type(Refusal, messages)
    assert timings.keys() == set(with_bases(*rows))
    for timing in timings.values():
        base = timings[timing.row.base()]
        assert timing.base == base.samples
        assert [len(each) for each in timing.samples] == [LEAST_ROUNDS] * 3
        assert all(0 < seconds < 60 for seconds in timing.samples.seconds)
        assert timing.window == base.window
        assert (timing.proof is None) == (timing.row.subject == BASE)
    decoding = [timings[of].samples.turns for of in (rows[1], rows[2], rows[1].base())]
    assert [sorted(turns) for turns in zip(*decoding, strict=True)] == [[0, 1, 2]] * LEAST_ROUNDS
    assert set(timings[rows[0]].beside) == {str(rows[0]), str(rows[0].base())}
    assert set(timings[rows[1]].beside) == {str(rows[1]), str(rows[2]), str(rows[1].base())}


def test_of_a_switch_every_sample_has_its_parts() -> None:
    switch = row("reference", "merged", "switch")
    timings = {timing.row: timing for timing in of_type(Timing, compared(switch))}
    samples, parts = timings[switch].samples.seconds, timings[switch].parts

    assert list(parts) == ["evict", "load", "merge"]
    for total, *each in zip(samples, *parts.values(), strict=True):
        assert 0 < sum(each) <= total
    assert timings[switch.base()].parts == {}


def test_whoever_waits_is_told_what_was_proven_and_what_is_timed() -> None:
    texts = [text for (text,) in of_type(Progress, compared(row("reference", "batched", "decode", adapters=2)))]

    assert texts[0].startswith("reference batched r4 n2 is right: 28 checks, errors up to 0.")
    assert texts[1:] == ["timing decode: 2 rows taking turns, about 0 s"]


def test_a_subject_that_raises_or_is_wrong_is_refused_by_kind_and_the_others_are_timed() -> None:
    bad = [row(f"{PLANTED}:{name}", "separate", "decode") for name in ("RAISES", "DROPPED")]
    good = row("reference", "separate", "decode")
    messages = compared(*bad, good, row(f"{PLANTED}:DROPPED", "merged", "decode"))
    raised, wrong = of_type(Refusal, messages)

    assert (raised.row, raised.kind, raised.text) == (bad[0], "error", "RuntimeError: no kernel for this machine")
    assert (wrong.row, wrong.kind) == (bad[1], "wrong")
    assert wrong.text.startswith("Wrong: model.layers.0.self_attn.q_proj: found ")
    timed = {timing.row for timing in of_type(Timing, messages)}
    assert timed == {good, good.base(), row(f"{PLANTED}:DROPPED", "merged", "decode")}


def test_a_row_is_not_refused_before_the_device_has_been_found_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def release(_device: str) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(turns, "release", release)
    messages: list[Any] = []
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        messages.extend(measure.compare(with_bases(row(f"{PLANTED}:RAISES", "separate", "decode")), "cpu", 0.0))
    assert not of_type(Refusal, messages)


def test_an_arm_that_fails_in_one_phase_is_refused_in_all() -> None:
    rows = [row(f"{PLANTED}:RAISES", "separate", phase) for phase in ("prefill", "decode")]

    assert [refusal.row for refusal in of_type(Refusal, compared(*rows))] == rows


def test_a_step_that_fails_only_at_its_full_size_costs_its_own_row() -> None:
    greedy, good = row(f"{PLANTED}:GREEDY", "separate", "train"), row("reference", "separate", "train")
    messages = compared(greedy, good)

    (refusal,) = of_type(Refusal, messages)
    assert refusal == Refusal(greedy, "oom", "MemoryError: a batch is too much")
    assert {timing.row for timing in of_type(Timing, messages)} == {good, good.base()}


def test_without_its_base_a_row_is_timed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(model: Any, subject: Any, *arguments: Any, **keywords: Any) -> Any:
        if subject is None:
            raise torch.OutOfMemoryError("full fine-tuning is too much")
        return build_arm(model, subject, *arguments, **keywords)

    monkeypatch.setattr(ready, "build_arm", build)
    good = row("reference", "separate", "train")
    messages = compared(good)

    assert of_type(Refusal, messages) == [Refusal(good.base(), "oom", "OutOfMemoryError: full fine-tuning is too much")]
    (timing,) = of_type(Timing, messages)
    assert (timing.row, timing.base) == (good, Samples([], [], []))


@pytest.mark.parametrize(("phase", "builds"), [("train", 2), ("decode", 1)])
def test_arms_that_do_not_fit_together_take_turns_with_a_base_of_their_own(
    monkeypatch: pytest.MonkeyPatch, phase: str, builds: int
) -> None:
    built = []

    def build_base(*arguments: Any) -> Any:
        built.append(1)
        return original(*arguments)

    original = ready.build_base
    monkeypatch.setattr(measure, "build_base", build_base)
    monkeypatch.setattr(measure, "free_bytes", lambda _: 0)
    rows = [row(subject, "separate", phase) for subject in ("reference", "peft")]
    messages = compared(*rows)

    assert not of_type(Refusal, messages)
    timings = of_type(Timing, messages)
    for timing in timings:
        assert len(timing.beside) == 2
        assert len(timing.base.seconds) == len(timing.samples.seconds)
    assert sorted(timing.row.subject for timing in timings) == [BASE, BASE, "peft", "reference"]
    # A base that was trained is no control any more; one that was not is kept.
    assert len(built) == builds


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "oom"),
        (torch.OutOfMemoryError("CUDA out of memory"), "oom"),
        (Wrong("q_proj"), "wrong"),
        (Unproven("q_proj"), "unproven"),
        (AssertionError(), "error"),
        (RuntimeError("no kernel"), "error"),
    ],
)
def test_failures_are_told_apart(error: Exception, kind: str) -> None:
    assert ready.refusal_kind(error) == kind


@pytest.mark.parametrize(
    ("error", "device", "text"),
    [
        (RuntimeError("no kernel"), "cuda:1", "RuntimeError: no kernel"),
        (MemoryError("full"), "cpu", "MemoryError: full"),
        (torch.OutOfMemoryError("full"), "cuda:1", "OutOfMemoryError: full (peak reached: 1,024 MiB)"),
    ],
)
def test_where_a_device_s_memory_ran_out_its_peak_is_told(
    monkeypatch: pytest.MonkeyPatch, error: Exception, device: str, text: str
) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", {"cuda:1": 1 << 30}.__getitem__)

    assert ready.told(error, device) == text


def test_a_gpu_that_is_lost_while_building_ends_the_comparison() -> None:
    messages: list[Any] = []
    with pytest.raises(GpuLost):
        messages.extend(measure.compare(with_bases(row(f"{FAULTY}:LOSES", "separate", "decode")), "cpu", 0.0))
    assert not of_type(Refusal, messages)


def test_a_device_that_is_out_of_order_after_a_failure_ends_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def synchronize(device: str) -> None:
        done.append(device)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("empty"))
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        ready.release("cuda:1")
    ready.release("cpu")

    assert done == ["empty", "cuda:1"]


# --- in hand --------------------------------------------------------------------------------------------------------


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers that were taken in hand, in order."""
    numbers: list[int] = []
    monkeypatch.setattr(measure, "hold", numbers.append)
    return numbers


@pytest.mark.parametrize(("name", "later"), [("EXITS", False), ("KILLED", True)])
def test_the_row_that_is_built_or_run_is_in_hand(
    monkeypatch: pytest.MonkeyPatch, held: list[int], name: str, later: bool
) -> None:
    class Dead(BaseException):
        pass

    def die(*_: object) -> None:
        raise Dead

    monkeypatch.setattr(os, "_exit", die)
    monkeypatch.setattr(os, "kill", die)
    rows = with_bases(*(row(of, "separate", "decode") for of in ("reference", f"{FAULTY}:{name}")))
    with pytest.raises(Dead):
        list(measure.compare(rows, "cpu", 0.0))

    assert held[-1] == 2
    # Built in order with the base last; it dies at once, or when they take turns.
    assert (held[:3] == [1, 2, 0]) == later
    assert later or held == [1, 2]


def test_so_is_the_row_that_is_weighed(held: list[int]) -> None:
    rows = [row("reference", "separate", phase) for phase in ("prefill", "decode")]
    messages = measure.weigh(rows, "cpu")

    assert next(messages)["hard"]["device"] == "cpu"  # type: ignore[call-overload]  # the fingerprint comes first
    assert held == []
    assert [(held[-1], message[0]) for message in messages] == list(enumerate(rows))  # type: ignore[index]


# --- weigh ----------------------------------------------------------------------------------------------------------

ADAPTER_BYTES = (
    4 * 2 * sum(4 * (d_in + d_out) for d_in, d_out in [(64, 64)] * 2 + [(64, 32)] * 2 + [(64, 128)] * 2 + [(128, 64)])
)


def weighed(*rows: Row) -> list[dict[str, Any]]:
    fingerprint, *weighings = measure.weigh(rows, "cpu")
    assert isinstance(fingerprint, dict)
    found: dict[Row, dict[str, Any]] = dict(weighings)  # type: ignore[arg-type]  # the fingerprint is off
    assert list(found) == list(rows)
    return list(found.values())


def test_memory_is_told_for_every_phase_of_an_arm() -> None:
    for peaks in weighed(row("reference", "separate", "prefill"), row("reference", "separate", "decode")):
        assert peaks.keys() == {
            "parameter_bytes",
            "allocated_peak_bytes",
            "reserved_peak_bytes",
            "nvml_process_bytes",
            "nvml_device_delta_bytes",
            "accounting_peak_bytes",
            "context_bytes",
            "resident_peak_bytes",
            "saved_tensor_bytes",
            "attribution",
        }
        assert all(isinstance(value, (int, str)) for value in peaks.values())


def test_an_adapter_weighs_its_factors_and_a_merged_one_nothing() -> None:
    rows = [row("reference", setup, "decode") for setup in ("separate", "merged", "four_bit")]
    base, separate, merged, four_bit = (weighed(row)[0]["parameter_bytes"] for row in [rows[0].base(), *rows])

    assert separate == base + ADAPTER_BYTES
    assert merged == base
    assert four_bit < 0.6 * base


@pytest.mark.parametrize("setup", ["separate", "merged", "batched", "four_bit"])
def test_what_an_arm_is_judged_by_is_not_weighed_with_it(monkeypatch: pytest.MonkeyPatch, setup: str) -> None:
    def weigh(arm: Arm, *_: object, **__: object) -> dict[str, Any]:
        return {"adapters": arm.adapters, "controls": arm.controls}

    monkeypatch.setattr(measure, "peak_memory", weigh)

    assert weighed(row("reference", setup, "decode")) == [{"adapters": {}, "controls": {}}]


def test_training_an_adapter_saves_less_for_backward_than_full_fine_tuning() -> None:
    of = row("reference", "separate", "train", sequence=32)
    (full,), (adapter,) = weighed(of.base()), weighed(of)

    assert adapter["saved_tensor_bytes"] > 0
    assert full["saved_tensor_bytes"] > 0
    assert full["parameter_bytes"] < adapter["parameter_bytes"]
