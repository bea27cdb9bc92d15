"""Joules of a run, by a meter and a clock that exist only here: no test waits."""

from __future__ import annotations

import json
import math
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lora_bench.bench import energy
from lora_bench.bench.energy import Energy, measure_energy
from lora_bench.bench.meter import Meter
from lora_bench.bench.nvml import GpuLost, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LOOK = 0.02
IDLE, BUSY, STEP = 60.0, 400.0, 0.013


class World(Meter):
    """A device that draws `idle` watts, or `busy` while a step runs, and shows it every `tick` seconds."""

    source, attribution = "a test", "the device"

    def __init__(
        self, *, idle: float = IDLE, busy: float = BUSY, tick: float = 0.1, step_seconds: float = STEP
    ) -> None:
        self.idle, self.busy, self.tick, self.step_seconds = idle, busy, tick, step_seconds
        self.time, self.drawn, self.shown, self.steps = 1000.0, 5e6, 5e6, 0
        self.power_told: Callable[[float], float | Unavailable] = lambda watts: watts
        self.counter_told: Callable[[float], float | Unavailable] = lambda joules: joules
        self._next_tick, self._present = 1000.0 + tick, idle
        self._look: Callable[[], None] = lambda: None
        self._next_look = math.inf

    def joules(self) -> float | Unavailable:
        return self.counter_told(self.shown)

    def watts(self) -> float | Unavailable:
        return self.power_told(self._present)

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.pass_time(seconds, self.idle)

    @contextmanager
    def every(self, look: Callable[[], None]) -> Iterator[None]:
        look()
        self._look, self._next_look = look, self.time + LOOK
        yield
        self._next_look = math.inf
        look()

    def step(self) -> None:
        self.steps += 1
        self.pass_time(self.step_seconds, self.busy)

    def pass_time(self, seconds: float, watts: float) -> None:
        end, self._present = self.time + seconds, watts
        while self.time < end:
            now = min(end, self._next_tick, self._next_look)
            self.drawn += watts * (now - self.time)
            self.time = now
            if now == self._next_tick:
                self.shown, self._next_tick = self.drawn, now + self.tick
            if now == self._next_look:
                self._next_look = now + LOOK
                self._look()


def measured(world: World, **more: Any) -> Energy:
    found = measure_energy(world.step, device="cpu", tokens=8, meter=world, **more)
    assert isinstance(found, Energy), found
    return found


def test_a_steady_run_s_joules_are_its_watts_times_its_seconds() -> None:
    found = measured(world := World())

    assert found.validity == "verified"
    assert found.mean_watts == pytest.approx(BUSY, rel=0.005)
    assert found.joules == pytest.approx(BUSY * found.window_seconds, rel=0.005)
    assert found.idle_watts == pytest.approx(IDLE, rel=0.05)
    assert found.joules_net == pytest.approx((BUSY - IDLE) * found.window_seconds, rel=0.01)
    assert found.joules_per_step == pytest.approx(BUSY * STEP, rel=0.005)
    assert found.joules_per_token == pytest.approx(found.joules_per_step / 8)
    assert found.steps == world.steps - 1  # the first warms up
    assert found.window_seconds == pytest.approx(found.steps * STEP)
    assert 100 <= found.ticks <= 110
    assert 10 <= found.window_seconds <= 11
    assert (found.source, found.attribution) == ("a test", "the device")


def test_a_step_that_takes_seconds_sees_every_tick() -> None:
    found = measured(World(step_seconds=1.7))

    assert found.ticks >= 100
    assert found.validity == "verified"
    assert found.joules_per_step == pytest.approx(BUSY * 1.7, rel=0.01)


def test_a_slow_counter_gets_a_longer_window() -> None:
    found = measured(World(tick=0.2))

    assert found.validity == "verified"
    assert 20 <= found.window_seconds <= 21


@pytest.mark.parametrize(
    ("world", "seconds", "validity"),
    [
        (
            World(),
            2.0,
            "invalid: the counter moved 59 times, at least 100 are wanted; a window of 5.9 s, at least 10 are wanted",
        ),
        (World(tick=0.02), 3.0, "invalid: a window of 3.0 s, at least 10 are wanted"),
        (World(tick=0.5), 10.0, "invalid: the counter moved 59 times, at least 100 are wanted"),
    ],
    ids=["short and few", "short", "few"],
)
def test_too_short_a_run_is_labelled_and_ends(world: World, seconds: float, validity: str) -> None:
    found = measured(world, seconds=seconds)

    assert found.validity == validity
    assert found.window_seconds <= 3 * seconds + STEP


@pytest.mark.parametrize(
    ("power", "validity"),
    [
        (lambda watts: watts * 1.04, "verified"),
        (lambda watts: watts * 1.08, "unverified: integrated power is +8.0% off"),
        (lambda watts: watts * 0.5, "unverified: integrated power is -50.0% off"),
        (lambda _watts: Unavailable("NVML: Not Supported", 3), "unverified: NVML: Not Supported"),
    ],
)
def test_joules_are_verified_by_integrated_power(power: Callable[[float], float | Unavailable], validity: str) -> None:
    world = World()
    world.power_told = power
    found = measured(world)

    assert found.validity == validity
    assert found.joules == pytest.approx(BUSY * found.window_seconds, rel=0.005)


def test_power_that_is_rarely_told_verifies_nothing() -> None:
    world, told = World(), iter(range(10**6))
    world.power_told = lambda watts: Unavailable("busy") if next(told) % 100 else watts
    assert measured(world).validity == "unverified: busy"


def unreadable_after(world: World, seconds: float, what: float | Unavailable) -> None:
    world.counter_told = lambda joules: joules if world.time < 1000 + seconds else what


@pytest.mark.parametrize(
    ("seconds", "what", "reason"),
    [
        (0.0, Unavailable("NVML: Not Supported", 3), "NVML: Not Supported"),
        (5.0, Unavailable("NVML: Timeout", 10), "NVML: Timeout"),
        (5.0, 7.0, r"the counter went back from 5.00\d*e\+06 to 7 J"),
        (0.0, 5e6, "the energy counter did not move twice"),
        (2.05, 6e6, "the energy counter did not move twice"),
    ],
    ids=["never", "no more", "back", "still", "moved once"],
)
def test_a_counter_that_is_no_good_gives_no_joules(seconds: float, what: float | Unavailable, reason: str) -> None:
    world = World()
    unreadable_after(world, seconds, what)
    found = measure_energy(world.step, device="cpu", tokens=8, meter=world)

    assert isinstance(found, Unavailable)
    assert re.fullmatch(reason, found.reason), found
    assert world.time < 1000 + 2 + 10 + 2, "it ended as soon as that was clear"


def test_without_idle_power_nothing_is_subtracted() -> None:
    found = measured(World(), idle_seconds=0.0)

    assert found.idle_watts == Unavailable("the energy counter did not move twice")
    assert found.joules_net == Unavailable("idle power is not known: the energy counter did not move twice")
    assert found.validity == "verified"


def test_a_run_that_draws_no_more_than_idle_has_no_net_joules() -> None:
    found = measured(World(idle=500.0))

    assert found.joules_net == Unavailable("idle, it drew no less: 500.0 W")


def test_it_is_ready_for_json() -> None:
    found = json.loads(json.dumps(measured(World(), idle_seconds=0.0).as_dict()))

    assert found["idle_watts"] == "unavailable (the energy counter did not move twice)"
    assert found["joules_net"].startswith("unavailable (idle power is not known")
    assert {name for name, value in found.items() if isinstance(value, str)} == {
        *("idle_watts", "joules_net", "source", "attribution", "validity"),
    }


def test_each_step_ends_on_an_idle_device(monkeypatch: pytest.MonkeyPatch) -> None:
    journal: list[str] = []
    world = World(step_seconds=1.0)

    def step() -> None:
        journal.append("step")
        world.step()

    monkeypatch.setattr(torch.cuda, "synchronize", journal.append)
    measure_energy(step, device="cuda:1", tokens=1, meter=world)

    assert journal[::2] == ["step"] * world.steps
    assert journal[1::2] == ["cuda:1"] * world.steps


def test_a_meter_that_is_not_there_says_why_before_any_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "meter_of", lambda device: Unavailable(f"none of {device}"))
    found = measure_energy(lambda: pytest.fail("a step was run"), device="cpu", tokens=1)

    assert found == Unavailable("none of cpu")


def test_a_lost_device_ends_the_run() -> None:
    world = World()

    def lose(joules: float) -> float:
        if world.time > 1005:
            raise GpuLost("GPU-one", "nvmlDeviceGetTotalEnergyConsumption", "GPU is lost")
        return joules

    world.counter_told = lose
    with pytest.raises(GpuLost, match=r"^GPU is lost: device GPU-one"):
        measure_energy(world.step, device="cpu", tokens=1, meter=world)
