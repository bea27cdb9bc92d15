"""NVML probes: each gives a value or `Unavailable(reason, code)`, never 0 in place of what could not be read.

A lost device raises `GpuLost`. Devices are named by UUID, since CUDA's and NVML's indices differ. Nothing here changes
a setting of a device.
"""

from __future__ import annotations

import os
import re
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import pynvml

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

T = TypeVar("T")
RETRIES = 2
"""How often a call that timed out is tried again."""
LOST = (pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED)
OLDER = (
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
    pynvml.NVML_ERROR_INVALID_ARGUMENT,
)
"""How a driver that knows only an older form of a call says so."""
INTEGERS = {
    pynvml.NVML_VALUE_TYPE_UNSIGNED_INT: ("uiVal", 32),
    pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG: ("ulVal", 64),
    pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: ("ullVal", 64),
}
"""Where a field's value stands by its type, and of how many bits it is."""
POWER_INSTANT = 186
THROTTLE_FIELDS = {
    74: "software_power_cap_ns",
    76: "sync_boost_ns",
    269: "software_thermal_ns",
    270: "hardware_thermal_ns",
    271: "power_brake_ns",
}
"""NVML's fields that count for how long clocks were held down, in nanoseconds since the driver was loaded."""
RENUMBERED, BY = ((575,), (580, 82)), 18
"""From the first of these drivers to before the second, the last three fields have numbers that are so much smaller.

Source: nvml.h of CUDA 12.9 and 13.0 beside that of 13.1, and the releases of nvidia-ml-py for those drivers.
"""


class Unavailable(NamedTuple):
    """A quantity that could not be read: why, and NVML's number for it where NVML said so."""

    reason: str
    code: int | None = None

    def __str__(self) -> str:
        return f"unavailable ({self.reason})"


class GpuLost(Exception):
    """The device fell off its bus or must be reset: nothing more can be measured on it."""

    def __init__(self, uuid: str, call: str, reason: str) -> None:
        super().__init__(uuid, call, reason)
        self.uuid, self.call, self.reason = uuid, call, reason

    def __str__(self) -> str:
        return f"{self.reason}: device {self.uuid or 'unknown'}, in {self.call}"


class Reading(NamedTuple):
    """A quantity of the whole GPU: its value, where it came from, and whether other MIG instances share in it."""

    value: float
    source: str
    shared: bool = False


class Memory(NamedTuple):
    """Bytes of a device. By "v1", `used` includes what the driver reserves, and `reserved` is None."""

    total: int
    used: int
    free: int
    reserved: int | None
    source: str


class Device(NamedTuple):
    """NVML's handle of a device, and how it is asked."""

    uuid: str
    handle: Any

    @property
    def shared(self) -> bool:
        """Whether it is a MIG instance: power, energy and clocks are then those of the GPU that it is a part of."""
        return self.uuid.startswith("MIG-")

    def ask(self, call: str, *arguments: Any) -> Any:
        return ask(self.uuid, call, self.handle, *arguments)

    def ask_board(self, call: str, *arguments: Any) -> Any:
        """Ask the whole GPU."""
        if not self.shared:
            return self.ask(call, *arguments)
        return ask(self.uuid, call, self.ask("nvmlDeviceGetDeviceHandleFromMigDeviceHandle"), *arguments)


def probe(read: Callable[[Device], T], uuid: str) -> T | Unavailable:
    """`read` applied to the device with this UUID, with or without NVML's prefix "GPU-" or "MIG-".

    A call that times out is tried again twice. `read` may raise LookupError with the reason why there is no such value.
    Raises GpuLost where the device is gone.
    """
    try:
        with held():
            return read(_device(uuid))
    except pynvml.NVMLError as error:
        return Unavailable(f"NVML: {error}", error.value)
    except LookupError as error:
        return Unavailable(f"NVML: {error}")


@contextmanager
def held() -> Iterator[None]:
    """NVML stays loaded inside, so that many probes in a row start it only once."""
    ask("", "nvmlInit")
    try:
        yield
    finally:
        with suppress(pynvml.NVMLError):  # of a device that is lost: that is said already
            pynvml.nvmlShutdown()


def _device(uuid: str) -> Device:
    if uuid.startswith(("GPU-", "MIG-")):
        return Device(uuid, ask(uuid, "nvmlDeviceGetHandleByUUID", uuid))
    try:
        return _device(f"GPU-{uuid}")
    except pynvml.NVMLError as error:
        if error.value != pynvml.NVML_ERROR_NOT_FOUND:
            raise
        return _device(f"MIG-{uuid}")


def ask(uuid: str, call: str, *arguments: Any) -> Any:
    """What NVML answers; a call that times out is tried again."""
    for _ in range(RETRIES):
        try:
            return _ask_once(uuid, call, *arguments)
        except pynvml.NVMLError as error:
            if error.value != pynvml.NVML_ERROR_TIMEOUT:
                raise
    return _ask_once(uuid, call, *arguments)


def _ask_once(uuid: str, call: str, *arguments: Any) -> Any:
    if not hasattr(pynvml, call):
        raise LookupError(f"this release of nvidia-ml-py has no {call}")
    try:
        return getattr(pynvml, call)(*arguments)
    except pynvml.NVMLError as error:
        if error.value in LOST:
            raise GpuLost(uuid, call, str(error)) from error
        raise


def known(value: int | None, what: str, bits: int = 32) -> int:
    """NVML's "not available" reaches Python as None, or as the largest value of its type."""
    if value is None or value == 2**bits - 1:
        raise LookupError(f"the driver does not tell {what} here")
    return int(value)


def field_values(device: Device, numbers: Sequence[int]) -> list[int | Unavailable]:
    """NVML's field values. The call succeeds although a field does not, so each says for itself."""
    return [_field(device.uuid, item) for item in device.ask_board("nvmlDeviceGetFieldValues", list(numbers))]


def _field(uuid: str, item: Any) -> int | Unavailable:
    name = f"field {item.fieldId}"
    if item.nvmlReturn != pynvml.NVML_SUCCESS:
        reason = str(pynvml.NVMLError(item.nvmlReturn))
        if item.nvmlReturn in LOST:
            raise GpuLost(uuid, f"nvmlDeviceGetFieldValues, {name}", reason)
        return Unavailable(f"NVML: {name}: {reason}", item.nvmlReturn)
    if item.valueType not in INTEGERS:
        return Unavailable(f"NVML: {name} is no integer but of type {item.valueType}")
    member, bits = INTEGERS[item.valueType]
    value = int(getattr(item.value, member))
    return Unavailable(f"NVML: the driver does not tell {name} here") if value == 2**bits - 1 else value


def memory(uuid: str) -> Memory | Unavailable:
    """Bytes of the device, of all processes together."""

    def read(device: Device) -> Memory:
        try:
            found, source = device.ask("nvmlDeviceGetMemoryInfo", pynvml.nvmlMemory_v2), "v2"
        except pynvml.NVMLError as error:
            if error.value not in OLDER:
                raise
            found, source = device.ask("nvmlDeviceGetMemoryInfo"), "v1"
        total, used, free = (known(getattr(found, name), f"{name} memory", 64) for name in ("total", "used", "free"))
        return Memory(total, used, free, int(found.reserved) if source == "v2" else None, source)

    return probe(read, uuid)


def processes(uuid: str) -> dict[int, int | None] | Unavailable:
    """The compute processes on the device by the pid that NVML knows, with their bytes (None: not told)."""

    def read(device: Device) -> dict[int, int | None]:
        found = device.ask("nvmlDeviceGetComputeRunningProcesses")
        return {each.pid: None if each.usedGpuMemory == 2**64 - 1 else each.usedGpuMemory for each in found}

    return probe(read, uuid)


def process_bytes(uuid: str, pid: int | None = None) -> int | Unavailable:
    """Device memory in bytes that NVML counts for this process now (context and workspaces included)."""
    wanted, found = os.getpid() if pid is None else pid, processes(uuid)
    if isinstance(found, Unavailable):
        return found
    if wanted not in found:
        among = f"among {sorted(found)}: in a container NVML shows host pids" if found else "listed, nor is any other"
        return Unavailable(f"NVML: process {wanted} is not {among}")
    counted = found[wanted]
    return Unavailable("NVML: the driver does not tell memory by process here") if counted is None else counted


def accounting_peak_bytes(uuid: str, pid: int | None = None) -> int | Unavailable:
    """The most device memory that the process has held in its life, in bytes, from the driver's accounting."""
    wanted = os.getpid() if pid is None else pid

    def read(device: Device) -> int:
        if not device.ask("nvmlDeviceGetAccountingMode"):
            raise LookupError("accounting mode is off")
        return known(device.ask("nvmlDeviceGetAccountingStats", wanted).maxMemoryUsage, "a process's peak", 64)

    return probe(read, uuid)


def joules(uuid: str) -> Reading | Unavailable:
    """Energy of the whole GPU since its driver was loaded, in joules; it moves about every 100 ms."""

    def read(device: Device) -> Reading:
        counted = known(device.ask_board("nvmlDeviceGetTotalEnergyConsumption"), "energy", 64)
        return Reading(counted / 1e3, "nvml-total-energy", device.shared)

    return probe(read, uuid)


def watts(uuid: str) -> Reading | Unavailable:
    """Power of the whole GPU: of the instant where the driver tells it, else as it averages it (over 1 s, say)."""

    def read(device: Device) -> Reading:
        with suppress(pynvml.NVMLError, LookupError):  # of an older driver
            (instant,) = field_values(device, [POWER_INSTANT])
            if not isinstance(instant, Unavailable):
                return Reading(instant / 1e3, "nvml-power-instant", device.shared)
        usage = known(device.ask_board("nvmlDeviceGetPowerUsage"), "power")
        return Reading(usage / 1e3, "nvml-power-usage", device.shared)

    return probe(read, uuid)


def power_limit_watts(uuid: str) -> float | Unavailable:
    """The power limit that the driver enforces on the whole GPU, in watts."""
    return probe(lambda device: known(device.ask_board("nvmlDeviceGetEnforcedPowerLimit"), "its limit") / 1e3, uuid)


def sm_clock_mhz(uuid: str) -> Reading | Unavailable:
    """The clock of the streaming multiprocessors now."""
    return _clock("nvmlDeviceGetClockInfo", uuid)


def max_sm_clock_mhz(uuid: str) -> Reading | Unavailable:
    """The highest clock that the streaming multiprocessors can run at."""
    return _clock("nvmlDeviceGetMaxClockInfo", uuid)


def _clock(call: str, uuid: str) -> Reading | Unavailable:
    def read(device: Device) -> Reading:
        return Reading(known(device.ask_board(call, pynvml.NVML_CLOCK_SM), "clocks"), "nvml-sm-clock", device.shared)

    return probe(read, uuid)


def throttle_counters(uuid: str) -> dict[str, int | Unavailable] | Unavailable:
    """By reason, for how many nanoseconds the clocks were held down since the driver was loaded."""

    def read(device: Device) -> dict[str, int | Unavailable]:
        numbers = _throttle_numbers(str(ask(device.uuid, "nvmlSystemGetDriverVersion")))
        return dict(zip(THROTTLE_FIELDS.values(), field_values(device, numbers), strict=True))

    return probe(read, uuid)


def _throttle_numbers(driver: str) -> list[int]:
    """The numbers of `THROTTLE_FIELDS` in this driver, such as "580.65.06"."""
    begin, end = RENUMBERED
    renumbered = begin <= tuple(map(int, re.findall("[0-9]+", driver)[:2])) < end
    return [number - BY if renumbered and number > 250 else number for number in THROTTLE_FIELDS]


def driver_version(uuid: str) -> str | Unavailable:
    """The version of the device's driver."""
    return probe(lambda device: str(ask(device.uuid, "nvmlSystemGetDriverVersion")), uuid)
