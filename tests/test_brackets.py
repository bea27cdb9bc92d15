"""Models that do not fit beside their base: each alone, the base before it and after it, in the same process."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any, Self

import pytest
import torch

from lora_bench.bench import arm, brackets, measure, ready
from lora_bench.bench.brackets import bracketed
from lora_bench.bench.counts import Ceilings
from lora_bench.bench.sampling import LEAST_ROUNDS
from lora_bench.bench.turns import Launches, Progress, Refusal, Timing
from lora_bench.bench.workload import BASE, Row
from tests import micro_rows
from tests.micro_rows import with_bases
from tests.planted_subjects import PLANTED


def row(subject: str, setup: str, phase: str) -> Row:
    return micro_rows.row(subject, setup, phase, model="linear-24x40")


PREFILL, DECODE = row("reference", "separate", "prefill"), row("reference", "separate", "decode")
MERGED = row("peft", "merged", "decode")


class Device:
    """Notes what is built, and what is in hand."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.built = 0
        self.held: list[Row] = []
        build = ready.build_base

        def build_base(*arguments: Any) -> Any:
            self.built += 1
            return build(*arguments)

        patch.setattr(brackets, "build_base", build_base)

    def run(self, *rows: Row) -> list[Any]:
        return list(bracketed(with_bases(*rows), "cpu", 0.0, self.held.append))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def of_type(kind: type, messages: list[Any]) -> list[Any]:
    return [message for message in messages if isinstance(message, kind)]


def test_each_arm_is_timed_alone_between_two_runs_of_its_base(device: Device) -> None:
    messages = device.run(PREFILL, DECODE, MERGED)
    timings = {timing.row: timing for timing in of_type(Timing, messages)}

    assert timings.keys() == set(with_bases(PREFILL, DECODE, MERGED))
    for own in (PREFILL, DECODE, MERGED):
        timing = timings[own]
        assert (timing.interleaved, timing.beside) == (False, [])
        assert timing.samples.turns == [1] * LEAST_ROUNDS
        assert timing.base.turns == [0] * LEAST_ROUNDS + [2] * LEAST_ROUNDS
        assert timing.proof.checks >= 1
    for own in {PREFILL.base(), DECODE.base()}:
        assert timings[own].interleaved
        assert timings[own].base == timings[own].samples
        assert timings[own].beside == [str(own)]
    # The base after the one arm is the base before the next.
    assert timings[DECODE].base.seconds[LEAST_ROUNDS:] == timings[MERGED].base.seconds[:LEAST_ROUNDS]
    assert timings[DECODE].base.seconds[:LEAST_ROUNDS] == timings[DECODE.base()].samples.seconds


def test_a_model_is_let_go_of_before_the_next_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    models: list[Any] = []
    build = ready.build_base

    def build_base(*arguments: Any) -> Any:
        alive.append(sum(each() is not None for each in models))
        model = build(*arguments)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(brackets, "build_base", build_base)
    list(bracketed(with_bases(PREFILL, row("reference", "merged", "switch")), "cpu", 0.0, lambda _: None))

    # The first is what waits on the host; then one at a time: base, arm, base, arm, base.
    assert alive == [0, 1, 1, 1, 1, 1]


def test_a_base_that_is_trained_is_built_anew_for_each_of_its_runs(device: Device) -> None:
    training = row("reference", "separate", "train")
    messages = device.run(training)

    assert not of_type(Refusal, messages)
    assert [timing.row for timing in of_type(Timing, messages)] == [training.base(), training]
    assert device.built == 4
    assert next(of.subject for of in device.held if of in (training, training.base())) == BASE


def test_an_arm_that_fails_costs_itself_alone_and_no_run_of_the_base(device: Device) -> None:
    bad = row(f"{PLANTED}:RAISES", "separate", "decode")
    messages = device.run(bad, DECODE)

    (refusal,) = of_type(Refusal, messages)
    assert (refusal.row, refusal.kind) == (bad, "error")
    assert [timing.row for timing in of_type(Timing, messages)] == [DECODE.base(), DECODE]
    assert device.built == 1 + 4


def test_without_a_base_that_fits_an_arm_is_timed_all_the_same(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    build_arm = arm.build_arm

    def build(model: Any, subject: Any, *arguments: Any, **keywords: Any) -> Any:
        if subject is None:
            raise torch.OutOfMemoryError("full fine-tuning is too much")
        return build_arm(model, subject, *arguments, **keywords)

    monkeypatch.setattr(brackets, "build_arm", build)
    training = row("reference", "separate", "train")
    messages = device.run(training)

    assert [(refusal.row, refusal.kind) for refusal in of_type(Refusal, messages)] == [(training.base(), "oom")]
    (timing,) = of_type(Timing, messages)
    assert (timing.row, timing.base.seconds, timing.interleaved) == (training, [], False)


def test_what_happened_to_the_clocks_is_told_from_the_first_run_of_the_base_to_the_second(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []

    class Window:
        def __init__(self, _device: str) -> None:
            self.name = f"window {sum(each.startswith('open') for each in log)}"

        def __enter__(self) -> Self:
            log.append(f"open {self.name}")
            return self

        def __exit__(self, *_: object) -> None:
            log.append(f"shut {self.name}")

        def as_dict(self) -> dict[str, Any]:
            return {"name": self.name}

    monkeypatch.setattr(brackets, "Window", Window)
    rows, log_of = with_bases(DECODE, MERGED), log
    timings = {}
    for message in bracketed(rows, "cpu", 0.0, lambda of: log_of.append(of.arm_name)):
        if isinstance(message, Timing):
            timings[message.row] = message.window["name"]

    steps = [each for number, each in enumerate(log) if number == 0 or each != log[number - 1]]
    assert steps == [
        *("open window 0", "base", "reference separate r4", "open window 1", "base", "shut window 0"),
        *("peft merged r4", "open window 2", "base", "shut window 1"),
    ]
    assert timings == {DECODE.base(): "window 0", DECODE: "window 0", MERGED: "window 1"}


def test_a_gpu_tells_of_the_base_once(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[list[Row]] = []

    def look(steps: Any, hot: Any, *_: Any) -> Any:
        assert steps.keys() == hot.keys()
        looked.append(list(steps))
        yield from (Launches(of, {}) for of in steps)

    monkeypatch.setattr(brackets, "looked_at", look)
    messages = device.run(DECODE)

    assert looked == [[DECODE.base()], [DECODE]]
    assert len(of_type(Launches, messages)) == 2


@pytest.mark.parametrize(
    ("place", "room", "alone"), [("cuda", 0, True), ("cuda:1", 0, True), ("cuda", 1 << 40, False), ("cpu", 0, False)]
)
def test_only_a_gpu_without_room_for_two_has_brackets(
    monkeypatch: pytest.MonkeyPatch, place: str, room: int, alone: bool
) -> None:
    def told(name: str) -> Any:
        return lambda *_: iter([Progress(name)])

    for name, value in {
        "settle_threads": lambda _: None,
        "fingerprint": lambda _: {},
        "measure_ceilings": lambda *_: Ceilings(1.0, 1.0),
        "release": lambda _: None,
        "build_base": lambda *_: SimpleNamespace(),
        "parameter_bytes": lambda _: 100,
        "free_bytes": lambda _: room,
        "bracketed": told("alone"),
        "take_turns": told("together"),
    }.items():
        monkeypatch.setattr(measure, name, value)

    def last(*rows: Row) -> str:
        return str(of_type(Progress, list(measure.compare(rows, place, 0.0)))[-1].text)

    assert last(*with_bases(DECODE)) == ("alone" if alone else "together")
    assert last(DECODE.base()) == "together"
