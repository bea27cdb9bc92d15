"""Meters of energy: counters of the hardware that only go up, with the power of the moment where it is told."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from lora_bench.bench import nvml
from lora_bench.bench.nvml import Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

POWERCAP = Path("/sys/class/powercap")
SECONDS_BETWEEN_LOOKS = 0.02


class Meter:
    """A counter of joules with its clock. A meter of another kind overrides the first two verbs; a test, all."""

    source = ""
    """Where joules come from."""
    attribution = ""
    """Whose joules they are."""

    def joules(self) -> float | Unavailable:
        """What the counter shows now."""
        raise NotImplementedError

    def watts(self) -> float | Unavailable:
        """Power at this moment."""
        raise NotImplementedError

    def now(self) -> float:
        """Seconds, from any beginning."""
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        """Let so much time pass."""
        time.sleep(seconds)

    @contextmanager
    def every(self, look: Callable[[], None]) -> Iterator[None]:
        """Call `look` at the beginning, every 20 ms inside, from a thread, and at the end; what it raises is raised."""
        stop = Event()

        def watch() -> None:
            while not stop.wait(SECONDS_BETWEEN_LOOKS):
                look()

        look()
        with ThreadPoolExecutor(1) as pool:
            watching = pool.submit(watch)
            try:
                yield
            finally:
                stop.set()
            watching.result()
        look()


class NvmlMeter(Meter):
    """The energy counter of a GPU, by its UUID."""

    def __init__(self, uuid: str, *, shared: bool) -> None:
        self.uuid = uuid
        self.source = "nvml-total-energy"
        self.attribution = "the whole GPU, shared with its other MIG instances" if shared else "the GPU"

    def joules(self) -> float | Unavailable:
        return _value(nvml.joules(self.uuid))

    def watts(self) -> float | Unavailable:
        return _value(nvml.watts(self.uuid))

    @contextmanager
    def every(self, look: Callable[[], None]) -> Iterator[None]:
        """NVML stays loaded meanwhile."""
        with nvml.held(), super().every(look):
            yield


class RaplMeter(Meter):
    """The energy counters of the processor's packages (Intel's RAPL, which AMD's processors offer too).

    They count for the whole package, so for every process on it, and start again at 0 above max_energy_range_uj.
    """

    source = "rapl"
    attribution = "package, shared"

    def __init__(self, zones: list[Path]) -> None:
        self._zones = zones
        self._last: dict[Path, int] = {}
        self._microjoules = 0

    def joules(self) -> float | Unavailable:
        for zone in self._zones:
            raw, largest = _number(zone / "energy_uj"), _number(zone / "max_energy_range_uj")
            if isinstance(raw, Unavailable):
                return raw
            moved = raw - self._last.get(zone, raw)
            if moved < 0:
                if isinstance(largest, Unavailable):
                    return largest
                moved += largest
            self._microjoules += moved
            self._last[zone] = raw
        return self._microjoules / 1e6

    def watts(self) -> float | Unavailable:
        return Unavailable("RAPL counts energy and tells no power to check it against")


def meter_of(device: str) -> Meter | Unavailable:
    """The meter of a device ("cpu", "cuda", "cuda:1"), or why there is none."""
    if device.startswith("cuda"):
        from lora_bench.bench.machine import device_uuid

        uuid = device_uuid(device)
        found = nvml.joules(uuid)
        return found if isinstance(found, Unavailable) else NvmlMeter(uuid, shared=found.shared)
    return rapl_meter()


def rapl_meter() -> RaplMeter | Unavailable:
    """The meter of this machine's processor, or why there is none and what would help."""
    zones = sorted(zone for zone in POWERCAP.glob("intel-rapl:*") if _name(zone).startswith("package"))
    if not zones:
        return Unavailable(f"{POWERCAP} has no package of RAPL: a virtual machine, or its kernel module is not loaded")
    meter = RaplMeter(zones)
    first = meter.joules()
    return first if isinstance(first, Unavailable) else meter


def _name(zone: Path) -> str:
    try:
        return (zone / "name").read_text().strip()
    except OSError:
        return ""


def _number(path: Path) -> int | Unavailable:
    try:
        return int(path.read_text())
    except PermissionError:
        return Unavailable(f"{path} is for root only: an administrator can allow it with `chmod a+r {path}`")
    except (OSError, ValueError) as error:
        return Unavailable(f"{path} cannot be read: {error}")


def _value(reading: nvml.Reading | Unavailable) -> float | Unavailable:
    return reading if isinstance(reading, Unavailable) else reading.value
