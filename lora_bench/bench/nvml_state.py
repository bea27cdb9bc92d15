"""How a device is set and what it does at this moment, from NVML: read and told, never changed."""

from __future__ import annotations

import pynvml

from lora_bench.bench.nvml import Device, GpuLost, Unavailable, ask, held, known, memory, probe

REASONS = {
    0x001: "idle",
    0x002: "application clocks",
    0x004: "software power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "hardware power brake",
    0x100: "display clocks",
    0x200: "board limit",
    0x400: "reliability",
}
GONE = (pynvml.NVML_ERROR_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
COMPUTE_MODES = ("default", "exclusive thread", "prohibited", "exclusive process")


def device_count() -> int | Unavailable:
    """How many GPUs the driver shows to this process."""
    try:
        with held():
            return int(ask("", "nvmlDeviceGetCount"))
    except pynvml.NVMLError as error:
        return Unavailable(f"NVML: {error}", error.value)


def why_gone(uuid: str) -> str:
    """Why a device that NVML knew is there no more; nothing where it answers, or NVML says nothing of the kind."""
    try:
        found = memory(uuid)
    except GpuLost as error:
        return str(error)
    if isinstance(found, Unavailable) and found.code in GONE:
        return f"{found.reason}: device {uuid}"
    return ""


def throttle_reasons(uuid: str) -> tuple[str, ...] | Unavailable:
    """What holds the clocks down now, in words; empty where nothing does."""

    def read(device: Device) -> tuple[str, ...]:
        bits = int(device.ask_board("nvmlDeviceGetCurrentClocksEventReasons"))
        words = tuple(word for bit, word in REASONS.items() if bits & bit)
        rest = bits & ~sum(REASONS)
        return (*words, f"unknown ({rest:#x})") if rest else words

    return probe(read, uuid)


def temperature_celsius(uuid: str) -> int | Unavailable:
    """The GPU's temperature now."""

    def read(device: Device) -> int:
        return known(device.ask_board("nvmlDeviceGetTemperature", pynvml.NVML_TEMPERATURE_GPU), "its temperature")

    return probe(read, uuid)


def ecc_mode(uuid: str) -> bool | Unavailable:
    """Whether memory errors are corrected, which costs memory and bandwidth on some GPUs."""
    return probe(lambda device: bool(device.ask_board("nvmlDeviceGetEccMode")[0]), uuid)


def mig_mode(uuid: str) -> bool | Unavailable:
    """Whether the GPU is divided into MIG instances."""
    return probe(lambda device: bool(device.ask_board("nvmlDeviceGetMigMode")[0]), uuid)


def compute_mode(uuid: str) -> str | Unavailable:
    """Who may use the GPU: "default" (any process), "exclusive process", "prohibited"."""

    def read(device: Device) -> str:
        mode = device.ask_board("nvmlDeviceGetComputeMode")
        if mode >= len(COMPUTE_MODES):
            raise LookupError(f"compute mode {mode} is not known")
        return COMPUTE_MODES[mode]

    return probe(read, uuid)


def persistence_mode(uuid: str) -> bool | Unavailable:
    """Whether the driver stays loaded, with its counters, while no process uses the GPU."""
    return probe(lambda device: bool(device.ask_board("nvmlDeviceGetPersistenceMode")), uuid)


def accounting_mode(uuid: str) -> bool | Unavailable:
    """Whether the driver keeps each process's peak; only an administrator can switch it on."""
    return probe(lambda device: bool(device.ask("nvmlDeviceGetAccountingMode")), uuid)
