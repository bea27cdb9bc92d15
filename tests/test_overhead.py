"""What measuring costs, under a clock of the test's own: both ratios are read off what was planted."""

from __future__ import annotations

import itertools
import time

import pytest

from lora_bench.bench import overhead
from lora_bench.bench.clock import wall_clock


class Time:
    """A clock that only moves as it is told: a little at every look, and by the operation."""

    def __init__(self) -> None:
        self.now, self.look, self.took = 0, 0, 2_000_000

    def perf_counter_ns(self) -> int:
        self.now += self.look
        return self.now

    def operation(self) -> None:
        self.now += self.took


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    made = Time()
    monkeypatch.setattr(time, "perf_counter_ns", made.perf_counter_ns)
    monkeypatch.setattr(time, "monotonic", itertools.count().__next__)
    return made


def test_without_overhead_the_ratios_are_exact(clock: Time) -> None:
    clock.look = 1000  # ends the busy wait
    found = overhead.measure_overhead(clock.operation, budget_seconds=20)

    assert found.harness.median == pytest.approx(1.0, abs=1e-12)
    assert found.planted.median - 1 == pytest.approx(overhead.PLANTED, abs=2 * clock.look / clock.took)
    assert found.rounds >= 10


def test_a_harness_that_adds_to_the_time_is_seen(clock: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    clock.look = 1000
    monkeypatch.setattr(overhead, "wall_clock", lambda run: wall_clock(run) + 0.02 * clock.took / 1e9)
    found = overhead.measure_overhead(clock.operation, budget_seconds=20)

    assert found.harness.median == pytest.approx(1.02, abs=1e-3)
