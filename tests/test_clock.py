"""Clocks: seconds on the host, and by events on a CUDA device, which a recorder stands in for."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from lora_bench.bench.clock import clock_of, event_clock, moment, seconds_between, wall_clock


def test_the_cpu_s_clock_reads_seconds_around_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = itertools.count(5_000_000_000, 250_000_000), []
    monkeypatch.setattr(time, "perf_counter_ns", lambda: next(now))

    assert wall_clock(lambda: calls.append(1)) == 0.25
    assert calls == [1]


def test_the_cpu_s_clock_runs() -> None:
    assert 0.001 <= wall_clock(lambda: time.sleep(0.001)) < 60


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of torch.cuda, in order; 7.5 ms pass between any two events."""
    entries: list[str] = []

    class Event:
        names = itertools.cycle(("start", "end"))

        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing
            self.name = next(self.names)

        def record(self, stream: str) -> None:
            entries.append(f"{self.name} on {stream}")

        def synchronize(self) -> None:
            entries.append(f"wait for {self.name}")

        def elapsed_time(self, other: Event) -> float:
            entries.append(f"{self.name} to {other.name}")
            return 7.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: entries.append(f"idle {device}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    return entries


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_cuda_device_is_timed_from_idle_by_events_of_its_own_stream(journal: list[str], device: str) -> None:
    seconds = clock_of(device)(lambda: journal.append("step"))

    assert seconds == 0.0075
    assert journal == [
        f"idle {device}",
        f"start on stream of {device}",
        "step",
        f"end on stream of {device}",
        "wait for end",
        "start to end",
    ]


def test_moments_of_a_cuda_device_are_events_that_nobody_waits_for_before_they_are_read(journal: list[str]) -> None:
    start, end = moment("cuda:1"), moment("cuda:1")

    assert journal == ["start on stream of cuda:1", "end on stream of cuda:1"]
    assert seconds_between(start, end) == 0.0075
    assert journal[2:] == ["wait for end", "start to end"]


def test_moments_of_a_cpu_are_its_clock_s(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count(5_000_000_000, 250_000_000)
    monkeypatch.setattr(time, "perf_counter_ns", lambda: next(now))

    assert seconds_between(moment("cpu"), moment("cpu")) == 0.25


def test_the_device_s_kind_chooses_the_clock(journal: list[str]) -> None:
    assert clock_of("cpu") is wall_clock
    assert event_clock(lambda: None) == clock_of("cuda")(lambda: None) == 0.0075
