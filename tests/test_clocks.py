"""Clocks and throttling over a span: what moved, what did not, and what nobody can tell."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_bench.bench import clocks
from lora_bench.bench.clocks import (
    USUAL,
    Look,
    Window,
    cpu_clock_mhz,
    cpu_throttle_counters,
    joined,
    look_at_gpu,
    power_capped,
)
from lora_bench.bench.nvml import THROTTLE_FIELDS, Unavailable
from tests.fake_nvml import install


class Device:
    """Shows these looks one after the other, and a clock that a test sets."""

    def __init__(self, *looks: Look) -> None:
        self._looks: Iterator[Look] = iter(looks)
        self.taken = 0
        self.time = 50.0

    def look(self) -> Look:
        self.taken += 1
        return next(self._looks)

    def window(self) -> Window:
        return Window("cpu", look=self.look, now=lambda: self.time)


def over(before: Any, after: Any) -> Window:
    with Device(Look(1400, before), Look(1380, after)).window() as window:
        pass
    return window


@pytest.mark.parametrize(
    ("before", "after", "delta", "throttled"),
    [
        ({"heat": 3, "power": 9}, {"heat": 3, "power": 9}, {"heat": 0, "power": 0}, False),
        ({"heat": 3, "power": 9}, {"heat": 3, "power": 11}, {"heat": 0, "power": 2}, True),
        ({"heat": 3}, {"heat": 2}, {}, "unavailable (heat: it went back from 3 to 2: was the driver loaded again?)"),
        ({"heat": 3, "power": Unavailable("x")}, {"heat": 3, "power": 4}, {"heat": 0}, "unavailable (power: x)"),
        ({"heat": 3, "power": Unavailable("x")}, {"heat": 4, "power": 4}, {"heat": 1}, True),
        ({"heat": 3}, {}, {}, "unavailable (heat: it is no longer told)"),
        (Unavailable("x", 3), {"heat": 3}, {}, "unavailable (throttle counters: x)"),
        ({"heat": 3, "power": 9}, Unavailable("y"), {}, "unavailable (heat: y; power: y)"),
        ({USUAL: 3, "heat": 3}, {USUAL: 9, "heat": 3}, {USUAL: 6, "heat": 0}, False),
        ({USUAL: 3, "heat": 3}, {USUAL: 9, "heat": 4}, {USUAL: 6, "heat": 1}, True),
        ({USUAL: Unavailable("x"), "heat": 3}, {USUAL: 3, "heat": 3}, {"heat": 0}, False),
        ({USUAL: 3, "heat": Unavailable("x")}, {USUAL: 9, "heat": 3}, {USUAL: 6}, "unavailable (heat: x)"),
    ],
)
def test_a_span_is_throttled_where_a_counter_moved_other_than_that_of_the_power_limit(
    before: Any, after: Any, delta: dict[str, int], throttled: Any
) -> None:
    window = over(before, after)

    assert window.throttle_delta == delta
    assert (str(window.throttled) if isinstance(window.throttled, Unavailable) else window.throttled) == throttled
    assert window.clocks == [1400, 1380]


def test_between_samples_the_clock_is_looked_at_every_50_ms_at_most() -> None:
    device = Device(*(Look(1000 + number, {"heat": 0}) for number in range(5)))
    with device.window() as window:
        for milliseconds in (10, 30, 9, 2, 48, 3, 200):  # looks at 51, 102 and 302
            device.time += milliseconds / 1e3
            window.between()
        assert device.taken == 4
    assert window.clocks == [1000, 1001, 1002, 1003, 1004]
    assert window.seconds == pytest.approx(0.302)


def test_a_clock_that_nobody_tells_leaves_the_counters() -> None:
    with Device(*[Look(Unavailable("no clock"), {"heat": 3})] * 2).window() as window:
        pass

    assert window.clocks == []
    assert window.throttled is False
    assert window.unavailable == {"clock": "no clock"}


def test_a_span_that_has_not_ended_or_failed_knows_nothing() -> None:
    device = Device(Look(1000, {"heat": 0}))
    with suppress(KeyError), device.window() as window:
        assert window.throttled == Unavailable("the span has not ended")
        raise KeyError
    assert window.throttled == Unavailable("the span has not ended")
    assert device.taken == 1


def test_it_is_ready_for_json() -> None:
    assert json.loads(json.dumps(over({"heat": 3}, {"heat": 2}).as_dict())) == {
        "clocks": [1400, 1380],
        "throttle_delta": {},
        "throttled": "unavailable (heat: it went back from 3 to 2: was the driver loaded again?)",
        "seconds": 0.0,
        "shared": False,
        "unavailable": {"heat": "it went back from 3 to 2: was the driver loaded again?"},
    }


def test_a_gpu_is_looked_at_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    library = install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=device[5:]))
    with Window("cuda:MIG-part") as window:
        library.set("field 74", 1074 + 6)
        library.set("clock", 990)

    assert window.clocks == [1410, 990]
    assert window.throttle_delta["software_power_cap_ns"] == 6
    assert window.throttled is False
    assert window.shared


def test_every_counter_of_a_gpu_but_that_of_its_power_limit_throttles_it(monkeypatch: pytest.MonkeyPatch) -> None:
    library = install(monkeypatch)
    moved = {}
    for number, name in THROTTLE_FIELDS.items():
        with Window("cuda", look=lambda: look_at_gpu("GPU-one")) as window:
            library.set(f"field {number}", 5000)
        moved[name] = window.throttled

    assert moved == {name: name != USUAL for name in THROTTLE_FIELDS.values()}
    assert {USUAL} < moved.keys()


@pytest.mark.parametrize(
    ("nanoseconds", "seconds", "share"),
    [(0, 2.0, 0.0), (500_000_000, 2.0, 0.25), (2_000_000_001, 2.0, 1.0), (9, 0.0, 0)],
)
def test_how_long_a_power_limit_held_the_clocks_down_is_a_share_of_the_span(
    nanoseconds: int, seconds: float, share: float
) -> None:
    assert power_capped({"throttle_delta": {USUAL: nanoseconds, "heat": 7}, "seconds": seconds}) == share


def test_a_span_without_such_a_counter_was_at_no_power_limit() -> None:
    assert power_capped({"throttle_delta": {USUAL: "words"}, "seconds": 2.0}) == 0
    assert power_capped({"throttle_delta": {USUAL: 7}, "seconds": None}) == 0
    assert power_capped({}) == power_capped(over({"heat": 3}, {"heat": 3}).as_dict()) == 0


@pytest.fixture
def cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three CPUs, of which this process may use the first two."""
    monkeypatch.setattr(clocks, "CPUS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 0}, raising=False)
    for cpu, kilohertz in enumerate([1_200_000, 3_400_999, 5_000_000]):
        for name, value in {
            "cpufreq/scaling_cur_freq": kilohertz,
            "thermal_throttle/core_throttle_count": cpu + 1,
            "thermal_throttle/package_throttle_count": 10,
        }.items():
            path = tmp_path / f"cpu{cpu}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{value}\n")
    return tmp_path


def test_a_cpu_s_clock_and_counters_are_those_of_the_cores_in_use(cpus: Path) -> None:
    assert cpu_clock_mhz() == 3400
    assert cpu_throttle_counters() == {"core_events": 3, "package_events": 20}


def test_heat_on_a_cpu_throttles_the_span(cpus: Path) -> None:
    with Window("cpu") as window:
        (cpus / "cpu0/thermal_throttle/core_throttle_count").write_text("2\n")

    assert window.throttle_delta == {"core_events": 1, "package_events": 0}
    assert window.throttled is True


def test_a_machine_that_tells_neither_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "CPUS", tmp_path)
    with Window("cpu") as window:
        pass

    assert window.clocks == []
    assert isinstance(window.throttled, Unavailable)
    assert "thermal_throttle is not there" in window.throttled.reason
    assert window.unavailable["clock"].endswith("a virtual machine does not tell its clock")


def test_several_spans_are_one() -> None:
    one = {"clocks": [1], "throttle_delta": {"a": 1}, "throttled": False, "seconds": 1.0, "shared": False}
    other = {"clocks": [2], "throttle_delta": {"a": 2, "b": 3}, "throttled": False, "seconds": 0.5, "shared": True}
    one["unavailable"], other["unavailable"] = {}, {"clock": "why"}

    assert joined([one, other]) == {
        "clocks": [1, 2],
        "throttle_delta": {"a": 3, "b": 3},
        "throttled": False,
        "seconds": 1.5,
        "shared": True,
        "unavailable": {"clock": "why"},
    }
    assert joined([one, other | {"throttled": True}])["throttled"] is True
    assert joined([one | {"throttled": "unavailable (x)"}, other])["throttled"] == "unavailable (x)"
    assert joined([one | {"throttled": "unavailable (x)"}, other | {"throttled": True}])["throttled"] is True
