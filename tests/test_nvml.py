"""NVML's probes on a fake library: a value, or why there is none."""

from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from lora_bench.bench import nvml
from lora_bench.bench.nvml import Unavailable

UUID = "0c9f0d9e-1111-2222-3333-444455556666"


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """NVML functions by name, without a driver: replace an entry to change an answer."""
    answers: dict[str, Any] = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlDeviceGetComputeRunningProcesses": lambda _handle: [SimpleNamespace(pid=7, usedGpuMemory=3 << 30)],
        "nvmlSystemGetDriverVersion": lambda: "580.1",
        "nvmlDeviceGetEnforcedPowerLimit": lambda _handle: 700_000,
    }
    for name in answers:
        monkeypatch.setattr(pynvml, name, lambda *arguments, _name=name: answers[_name](*arguments))
    return answers


def fails(code: int) -> Any:
    def function(*_arguments: object) -> None:
        raise pynvml.NVMLError(code)

    return function


def test_memory_of_this_process_is_found_by_its_pid(driver: dict[str, Any]) -> None:
    assert nvml.process_bytes(UUID, pid=7) == 3 << 30


def test_the_device_is_found_by_uuid_with_nvml_s_prefix(driver: dict[str, Any]) -> None:
    seen: list[str] = []
    driver["nvmlDeviceGetHandleByUUID"] = seen.append
    nvml.driver_version(UUID)
    nvml.driver_version(f"MIG-{UUID}")

    assert seen == [f"GPU-{UUID}", f"MIG-{UUID}"]


def test_values_come_in_the_units_of_their_names(driver: dict[str, Any]) -> None:
    assert nvml.power_limit_watts(UUID) == 700.0
    assert nvml.driver_version(UUID) == "580.1"


@pytest.mark.parametrize(
    ("function", "answer", "reason"),
    [
        ("nvmlInit", fails(pynvml.NVML_ERROR_DRIVER_NOT_LOADED), "NVML: Driver Not Loaded"),
        ("nvmlDeviceGetHandleByUUID", fails(pynvml.NVML_ERROR_NOT_FOUND), "NVML: Not Found"),
        (
            "nvmlDeviceGetComputeRunningProcesses",
            fails(pynvml.NVML_ERROR_NO_PERMISSION),
            "NVML: Insufficient Permissions",
        ),
        ("nvmlDeviceGetComputeRunningProcesses", fails(pynvml.NVML_ERROR_GPU_IS_LOST), "NVML: GPU is lost"),
        (
            "nvmlDeviceGetComputeRunningProcesses",
            lambda _handle: [SimpleNamespace(pid=1, usedGpuMemory=5)],
            "NVML: process 7 is not among [1]: in a container NVML shows host pids",
        ),
        (
            "nvmlDeviceGetComputeRunningProcesses",
            lambda _handle: [SimpleNamespace(pid=7, usedGpuMemory=None)],
            "NVML: the driver does not tell memory by process here",
        ),
        (
            "nvmlDeviceGetComputeRunningProcesses",
            lambda _handle: [SimpleNamespace(pid=7, usedGpuMemory=2**64 - 1)],
            "NVML: the driver does not tell memory by process here",
        ),
    ],
)
def test_what_cannot_be_read_is_unavailable_with_the_reason(
    driver: dict[str, Any], function: str, answer: Any, reason: str
) -> None:
    driver[function] = answer

    assert nvml.process_bytes(UUID, pid=7) == Unavailable(reason)


def test_nvml_is_shut_down_also_after_an_error(driver: dict[str, Any]) -> None:
    shut = []
    driver["nvmlShutdown"] = lambda: shut.append(1)
    driver["nvmlDeviceGetComputeRunningProcesses"] = fails(pynvml.NVML_ERROR_UNKNOWN)
    nvml.process_bytes(UUID, pid=7)

    assert shut == [1]


def test_without_a_driver_the_real_library_says_so() -> None:
    value = nvml.process_bytes(UUID)

    assert isinstance(value, (int, Unavailable))
    assert value != 0
