"""NVML probes: each gives a value or `Unavailable(reason)`, never 0 in place of what could not be read."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import pynvml

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class Unavailable(NamedTuple):
    """A quantity that could not be read, and why."""

    reason: str

    def __str__(self) -> str:
        return f"unavailable ({self.reason})"


def probe(read: Callable[[Any], T], uuid: str) -> T | Unavailable:
    """`read` applied to the NVML handle of the device with this UUID (CUDA's and NVML's indices differ).

    `read` may raise LookupError with the reason why NVML has no such value.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Unavailable(f"NVML: {error}")
    try:
        return read(pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"))
    except (pynvml.NVMLError, LookupError) as error:
        return Unavailable(f"NVML: {error}")
    finally:
        pynvml.nvmlShutdown()


def process_bytes(uuid: str, pid: int | None = None) -> int | Unavailable:
    """Device memory in bytes that NVML counts for this process now (context and workspaces included)."""
    wanted = os.getpid() if pid is None else pid

    def read(handle: Any) -> int:
        found = {process.pid: process.usedGpuMemory for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}
        if wanted not in found:
            raise LookupError(f"process {wanted} is not among {sorted(found)}: in a container NVML shows host pids")
        # NVML's "not available" reaches Python as None, or as the largest value of its 64 bits.
        if found[wanted] is None or found[wanted] == 2**64 - 1:
            raise LookupError("the driver does not tell memory by process here")
        return int(found[wanted])

    return probe(read, uuid)


def driver_version(uuid: str) -> str | Unavailable:
    """The version of the device's driver."""
    return probe(lambda _handle: str(pynvml.nvmlSystemGetDriverVersion()), uuid)


def power_limit_watts(uuid: str) -> float | Unavailable:
    """The power limit that the driver enforces, in watts."""
    return probe(lambda handle: int(pynvml.nvmlDeviceGetEnforcedPowerLimit(handle)) / 1e3, uuid)
