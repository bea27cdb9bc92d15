"""Clocks and throttling over a span of samples: read before and after it, never while something is timed."""

from __future__ import annotations

import os
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from lora_bench.bench import nvml
from lora_bench.bench.nvml import Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType
    from typing import Self

CPUS = Path("/sys/devices/system/cpu")
LEAST_SECONDS_APART = 0.05
"""Clocks are looked at no more often than this: a closer look disturbs and tells nothing more."""


USUAL = "software_power_cap_ns"
"""The counter that may move: under load a GPU lowers its clocks to stay within its power limit, as it is made to.

The limit itself is a part of the fingerprint. What else moves is a fault of its cooling, its supply or its neighbours.
"""
Counters: TypeAlias = "Mapping[str, int | Unavailable] | Unavailable"


class Look(NamedTuple):
    """Clock in MHz, and counters of throttling by reason, at one moment; shared: of more than this MIG instance."""

    clock: int | Unavailable
    counters: Counters
    shared: bool = False


class Window:
    """What happened to the clocks of `device` ("cpu", "cuda", "cuda:1") inside `with Window(device) as window:`.

    Counters are differenced over the span. On a GPU they are nanoseconds by reason, and the clock is that of the
    streaming multiprocessors (of the whole GPU, for a MIG instance). On a CPU they are events, and the clock is the
    highest among the cores that this process may use.
    """

    def __init__(
        self, device: str, *, look: Callable[[], Look] | None = None, now: Callable[[], float] = perf_counter
    ) -> None:
        self._look, self._now = look or _looking_at(device), now
        self.clocks: list[int] = []
        """MHz, in order of time: before the span, at each `between`, and after it."""
        self.throttle_delta: dict[str, int] = {}
        """By reason, how far its counter went; a counter that could not be read is not here but in `unavailable`."""
        self.unavailable: dict[str, str] = {}
        """By quantity, why it is not known."""
        self.seconds = 0.0
        self.shared = False
        """Whether clocks and counters are those of a whole GPU of which the device is a MIG instance."""

    def __enter__(self) -> Self:
        self._before, self._began = self._take(), self._now()
        self._looked = self._began
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = self._now() - self._began
        if error is None:  # a device that is lost would only be lost again
            self._compare(self._before.counters, self._take().counters)

    def between(self) -> None:
        """Look at the clock now, between two samples; nothing where the last look is less than 50 ms ago."""
        if self._now() - self._looked >= LEAST_SECONDS_APART:
            self._take()
            self._looked = self._now()

    @property
    def throttled(self) -> bool | Unavailable:
        """Whether a counter moved that should not; unavailable where none did but not all could be read.

        A GPU that only keeps to its power limit is not throttled: `power_capped` tells for how long it did.
        """
        if any(moved for name, moved in self.throttle_delta.items() if name != USUAL):
            return True
        unread = {name: why for name, why in self.unavailable.items() if name not in ("clock", USUAL)}
        if unread:
            return Unavailable("; ".join(f"{name}: {why}" for name, why in unread.items()))
        return False if self.throttle_delta else Unavailable("the span has not ended")

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        throttled = self.throttled
        return {
            "clocks": self.clocks,
            "throttle_delta": self.throttle_delta,
            "throttled": str(throttled) if isinstance(throttled, Unavailable) else throttled,
            "seconds": self.seconds,
            "shared": self.shared,
            "unavailable": self.unavailable,
        }

    def _take(self) -> Look:
        look = self._look()
        self.shared |= look.shared
        if isinstance(look.clock, Unavailable):
            self.unavailable["clock"] = look.clock.reason
        else:
            self.clocks.append(look.clock)
        return look

    def _compare(self, before: Counters, after: Counters) -> None:
        started = {"throttle counters": before} if isinstance(before, Unavailable) else before
        for name, start in started.items():
            end = after if isinstance(after, Unavailable) else after.get(name, Unavailable("it is no longer told"))
            if isinstance(start, Unavailable) or isinstance(end, Unavailable):
                self.unavailable[name] = next(each.reason for each in (start, end) if isinstance(each, Unavailable))
            elif end < start:
                self.unavailable[name] = f"it went back from {start} to {end}: was the driver loaded again?"
            else:
                self.throttle_delta[name] = end - start


def power_capped(window: Mapping[str, Any]) -> float:
    """The share of a window, as `Window.as_dict` tells it, in which a GPU's power limit held its clocks down.

    0 where it does not tell of it by numbers.
    """
    told = window.get("throttle_delta", {}).get(USUAL), window.get("seconds")
    nanoseconds, seconds = (each if isinstance(each, int | float) else 0 for each in told)
    return min(1.0, nanoseconds / 1e9 / seconds) if nanoseconds > 0 and seconds > 0 else 0.0


def _looking_at(device: str) -> Callable[[], Look]:
    if not device.startswith("cuda"):
        return lambda: Look(cpu_clock_mhz(), cpu_throttle_counters())
    from lora_bench.bench.machine import device_uuid

    uuid = device_uuid(device)
    return lambda: look_at_gpu(uuid)


def look_at_gpu(uuid: str) -> Look:
    """A GPU's look, by its UUID."""
    clock, counters = nvml.sm_clock_mhz(uuid), nvml.throttle_counters(uuid)
    if isinstance(clock, Unavailable):
        return Look(clock, counters)
    return Look(int(clock.value), counters, clock.shared)


def cpu_clock_mhz() -> int | Unavailable:
    """The highest present frequency among the CPUs that this process may run on: its own, where it is the busy one."""
    found = [_number(CPUS / f"cpu{cpu}" / "cpufreq/scaling_cur_freq") for cpu in own_cpus()]
    kilohertz = [value for value in found if value is not None]
    if not kilohertz:
        return Unavailable(f"{CPUS}/cpu*/cpufreq is not there: a virtual machine does not tell its clock")
    return max(kilohertz) // 1000


def cpu_throttle_counters() -> Counters:
    """How often the CPUs that this process may run on were throttled for heat, since the machine started."""
    counters = {}
    for part in ("core", "package"):
        found = [_number(CPUS / f"cpu{cpu}" / f"thermal_throttle/{part}_throttle_count") for cpu in own_cpus()]
        if counts := [value for value in found if value is not None]:
            counters[f"{part}_events"] = sum(counts)
    return counters or Unavailable(f"{CPUS}/cpu*/thermal_throttle is not there (Intel's processors have it)")


def own_cpus() -> list[int]:
    """The numbers of the CPUs that this process may run on."""
    if not hasattr(os, "sched_getaffinity"):
        return list(range(os.cpu_count() or 1))
    return sorted(os.sched_getaffinity(0))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def joined(windows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several windows, as `Window.as_dict` tells them, as one: throttled if any was, not known if any is not."""
    answers = [window["throttled"] for window in windows]
    moved: dict[str, int] = {}
    for window in windows:
        for name, by in window["throttle_delta"].items():
            moved[name] = moved.get(name, 0) + by
    return {
        "clocks": [clock for window in windows for clock in window["clocks"]],
        "throttle_delta": moved,
        "throttled": True in answers or next((each for each in answers if each is not False), False),
        "seconds": sum(window["seconds"] for window in windows),
        "shared": any(window["shared"] for window in windows),
        "unavailable": {name: why for window in windows for name, why in window["unavailable"].items()},
    }
