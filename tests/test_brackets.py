"""Models that do not fit beside their base: each alone, the base before it and after it, in the same process."""

from __future__ import annotations

import weakref
from typing import Any, Self

import pytest
import torch

from lora_bench.bench import brackets, clocks, ready, turns
from lora_bench.bench.brackets import bracketed
from lora_bench.bench.nvml import GpuLost
from lora_bench.bench.ready import build_base
from lora_bench.bench.sampling import LEAST_ROUNDS, Samples
from lora_bench.bench.turns import Launches, Refusal, Timing
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
        self.built: list[str] = []
        self.held: list[Row] = []
        self.breaks: dict[int, Exception] = {}
        """By the number of a base that is built, what happens to it."""
        build = ready.build_alone

        def build_alone(of: Row, *arguments: Any, **keywords: Any) -> Any:
            self.built.append(of.arm_name)
            if of.subject == BASE and (error := self.breaks.get(self.built.count(BASE))):
                raise error
            return build(of, *arguments, **keywords)

        patch.setattr(brackets, "build_alone", build_alone)

    def run(self, *rows: Row) -> list[Any]:
        asked = with_bases(*rows)
        return list(bracketed(asked, build_base(asked[0], "cpu"), "cpu", 0.0, self.held.append))


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

    def noted(*arguments: Any) -> Any:
        alive.append(sum(each() is not None for each in models))
        model = build(*arguments)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(ready, "build_base", noted)
    rows = with_bases(PREFILL, row(f"{PLANTED}:RAISES", "separate", "decode"), row("reference", "merged", "switch"))
    list(bracketed(rows, build(rows[0], "cpu"), "cpu", 0.0, lambda _: None))

    # Base, arm, base, the one that raises, arm, base.
    assert alive == [0] * 6


def test_a_base_that_is_trained_is_built_anew_for_each_of_its_runs(device: Device) -> None:
    training = row("reference", "separate", "train")
    messages = device.run(training)

    assert not of_type(Refusal, messages)
    assert [timing.row for timing in of_type(Timing, messages)] == [training.base(), training]
    assert device.built == [BASE, training.arm_name, BASE]


def test_the_second_run_of_a_base_is_the_arm_s_affair(device: Device) -> None:
    device.run(DECODE)

    names = [each.arm_name for each in device.held]
    assert [name for number, name in enumerate(names) if number == 0 or name != names[number - 1]] == [
        BASE,
        DECODE.arm_name,
    ]


def test_an_arm_that_fails_costs_itself_alone_and_no_run_of_the_base(device: Device) -> None:
    bad = row(f"{PLANTED}:RAISES", "separate", "decode")
    messages = device.run(bad, DECODE)

    (refusal,) = of_type(Refusal, messages)
    assert (refusal.row, refusal.kind) == (bad, "error")
    assert [timing.row for timing in of_type(Timing, messages)] == [DECODE.base(), DECODE]
    assert device.built == [BASE, bad.arm_name, DECODE.arm_name, BASE]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("in pieces"), RuntimeError("misaligned address")])
def test_a_base_that_does_not_run_again_costs_an_arm_its_ratio_alone(device: Device, error: Exception) -> None:
    device.breaks = {2: error}
    messages = device.run(DECODE, MERGED)
    timings = {timing.row: timing for timing in of_type(Timing, messages)}

    assert not of_type(Refusal, messages)
    assert list(timings) == [DECODE.base(), DECODE, MERGED]
    assert timings[DECODE].base.seconds == []
    # The next one has a run of the base before it again.
    assert timings[MERGED].base.turns == [0] * LEAST_ROUNDS + [2] * LEAST_ROUNDS


def test_a_gpu_that_is_lost_while_the_base_runs_again_ends_the_comparison(device: Device) -> None:
    device.breaks = {2: GpuLost("GPU-0", "nvmlDeviceGetMemoryInfo", "GPU is lost")}
    with pytest.raises(GpuLost):
        device.run(DECODE)


def test_without_a_base_that_fits_an_arm_is_timed_all_the_same(device: Device) -> None:
    device.breaks = dict.fromkeys(range(1, 9), torch.OutOfMemoryError("full fine-tuning is too much"))
    training = row("reference", "separate", "train")
    messages = device.run(training)

    assert [(refusal.row, refusal.kind) for refusal in of_type(Refusal, messages)] == [(training.base(), "oom")]
    (timing,) = of_type(Timing, messages)
    assert (timing.row, timing.base.seconds, timing.interleaved) == (training, [], False)
    assert device.built == [BASE, training.arm_name]


def test_what_happened_to_the_clocks_in_all_three_runs_is_told(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = 0

    class Window:
        def __init__(self, _device: str) -> None:
            nonlocal opened
            opened += 1
            self.number = opened

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def as_dict(self) -> dict[str, Any]:
            told = {"clocks": [self.number], "throttle_delta": {"thermal_ns": self.number}, "throttled": False}
            return told | {"seconds": 1.0, "shared": False, "unavailable": {}}

    monkeypatch.setattr(brackets, "Window", Window)
    bad = row(f"{PLANTED}:RAISES", "separate", "decode")
    timings = {timing.row: timing.window for timing in of_type(Timing, device.run(DECODE, bad, MERGED))}

    assert {of: window["clocks"] for of, window in timings.items()} == {
        DECODE.base(): [1],
        DECODE: [1, 3, 2],
        MERGED: [3, 5, 4],
    }
    assert timings[MERGED]["throttle_delta"] == {"thermal_ns": 12}
    assert timings[MERGED]["seconds"] == 3.0


def test_what_a_gpu_tells_comes_after_all_times(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[list[Row]] = []

    def look(steps: Any, hot: Any, *_: Any) -> Any:
        assert steps.keys() == hot.keys()
        looked.append(list(steps))
        yield from (Launches(of, {}) for of in steps)

    made = turns.made_ready
    monkeypatch.setattr(brackets, "looked_at", look)
    monkeypatch.setattr(brackets, "release", lambda _: None)
    monkeypatch.setattr(brackets, "made_ready", lambda rows, _make, _device: made(rows, on_cpu, "cpu"))
    monkeypatch.setattr(brackets, "sampled", lambda steps, *_: dict.fromkeys(steps, Samples([1.0], [0], [False])))
    monkeypatch.setattr(brackets, "Window", lambda _device: clocks.Window("cpu"))
    host = build_base(DECODE, "cpu")

    def on_cpu(of: Row) -> Any:
        return ready.build_alone(of, "cpu", host)

    messages = list(bracketed(with_bases(PREFILL, DECODE), host, "cuda", 0.0, lambda _: None))
    kinds = [type(each) for each in messages if isinstance(each, Timing | Launches)]

    assert kinds == [Timing] * 4 + [Launches] * 4
    assert looked == [[PREFILL, DECODE], [PREFILL.base(), DECODE.base()]]
