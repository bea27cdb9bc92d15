"""A CUDA device's peaks, by torch and by NVML, on a device that exists only here: whose count each figure is."""

from __future__ import annotations

import gc
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from torch import nn

from lora_bench.bench import memory
from lora_bench.bench.arm import Arm, Step
from lora_bench.bench.memory import NOT_READ
from lora_bench.bench.nvml import GpuLost, Unavailable
from tests.fake_nvml import install

if TYPE_CHECKING:
    from tests.fake_nvml import PythonLibrary

MIB = 2**20
ALLOCATED, RESERVED_PEAK, RESERVED = 10 * MIB, 25 * MIB, 20 * MIB
PROCESS, USED, BEFORE, ACCOUNTED = 300 * MIB, 900 * MIB, 500 * MIB, 350 * MIB
HOST_PID = 70_000


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of torch.cuda, in order."""
    journal: list[str] = []

    def note(name: str, answer: object = None) -> None:
        def function(device: str = "") -> object:
            journal.append(f"{name} {device}".strip())
            return answer

        monkeypatch.setattr(torch.cuda, name, function)

    monkeypatch.setattr(gc, "collect", lambda: journal.append("collect"))
    note("synchronize")
    note("empty_cache")
    note("reset_peak_memory_stats")
    note("memory_reserved", RESERVED)
    note("max_memory_allocated", ALLOCATED)
    note("max_memory_reserved", RESERVED_PEAK)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(uuid="one"))
    return journal


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, journal: list[str]) -> PythonLibrary:
    """A driver that tells everything but accounting, and knows this process by its pid."""
    library = install(monkeypatch)
    for name, value in {"accounting": 0, "pid 0": os.getpid(), "bytes 0": PROCESS, "used": USED}.items():
        library.set(name, value)
    return library


def peaks(used_before: int | Unavailable = BEFORE) -> dict[str, Any]:
    arm = Arm("base", cast("Any", nn.Linear(2, 2)))
    return memory.peak_memory(arm, Step(lambda: None), "cuda:1", train=False, used_before=used_before)


def test_a_device_s_peaks_are_the_step_s_own_and_nvml_is_read_right_after_it(
    library: PythonLibrary, journal: list[str]
) -> None:
    arm = Arm("base", cast("Any", nn.Linear(2, 2)))
    step = Step(lambda: journal.append("run"), prepare=lambda: journal.append("prepare"))
    found = memory.peak_memory(arm, step, "cuda:1", train=False, used_before=BEFORE)

    assert found == {
        "parameter_bytes": 24,
        "allocated_peak_bytes": ALLOCATED,
        "reserved_peak_bytes": RESERVED_PEAK,
        "resident_peak_bytes": "unavailable (measured on the device instead)",
        "nvml_process_bytes": PROCESS,
        "nvml_device_delta_bytes": USED - BEFORE,
        "accounting_peak_bytes": "unavailable (NVML: accounting mode is off)",
        "context_bytes": PROCESS - RESERVED,
        "attribution": "pid",
        "saved_tensor_bytes": "unavailable (nothing is saved to infer)",
    }
    assert journal == [
        *("prepare", "run", "prepare", "collect", "synchronize cuda:1", "empty_cache"),
        *("reset_peak_memory_stats cuda:1", "run", "synchronize cuda:1", "memory_reserved cuda:1"),
        *("max_memory_allocated cuda:1", "max_memory_reserved cuda:1"),
    ]


NO_PIDS = "unavailable (NVML: process {pid} is not among [{others}]: in a container NVML shows host pids)"


@pytest.mark.parametrize(
    ("values", "before", "process", "attribution"),
    [
        ({}, BEFORE, PROCESS, "pid"),
        ({"accounting": 1, "accounted pid": os.getpid(), "accounted peak": ACCOUNTED}, BEFORE, PROCESS, "accounting"),
        ({"accounting": 1, "accounted pid": HOST_PID}, BEFORE, PROCESS, "pid"),
        ({"pid 0": HOST_PID}, BEFORE, PROCESS, "sole-process"),
        ({"pid 0": HOST_PID, "processes": 2, "pid 1": 9, "bytes 1": 5}, BEFORE, NO_PIDS, "device-delta"),
        ({"pid 0": HOST_PID, "processes": 2, "pid 1": 9, "bytes 1": 5}, NOT_READ, NO_PIDS, "torch-only"),
        (
            {"processes": 0},
            BEFORE,
            "unavailable (NVML: process {pid} is not listed, nor is any other)",
            "device-delta",
        ),
        (
            {"bytes 0": 2**64 - 1},
            BEFORE,
            "unavailable (NVML: the driver does not tell memory by process here)",
            "device-delta",
        ),
        (
            {"pid 0": HOST_PID, "bytes 0": RESERVED - 1},
            BEFORE,
            "unavailable (NVML counts 20,971,519 bytes for it, and torch alone has reserved 20,971,520)",
            "device-delta",
        ),
    ],
    ids=[
        *("by its pid", "accounting", "accounting of another", "the only process", "one of two", "torch only"),
        *("no process at all", "no bytes by process", "too few bytes to be this process"),
    ],
)
def test_the_count_says_whose_it_is(
    library: PythonLibrary, values: dict[str, int], before: int | Unavailable, process: int | str, attribution: str
) -> None:
    for name, value in values.items():
        library.set(name, value)
    found = peaks(before)
    wanted = process if isinstance(process, int) else process.format(pid=os.getpid(), others=f"9, {HOST_PID}")

    assert (found["nvml_process_bytes"], found["attribution"]) == (wanted, attribution)
    assert found["context_bytes"] == (wanted - RESERVED if isinstance(wanted, int) else wanted)
    assert (found["accounting_peak_bytes"] == ACCOUNTED) == (attribution == "accounting")


def test_training_tells_what_it_saves_after_the_peaks(library: PythonLibrary, journal: list[str]) -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    step = Step(lambda: model(torch.ones(5, 3)).sum().backward())
    found = memory.peak_memory(Arm("base", cast("Any", model)), step, "cuda", train=True)

    assert found["saved_tensor_bytes"] == 4 * (5 * 3 + 5 * 4)
    assert journal[-1] == "max_memory_reserved cuda"


def test_a_device_whose_use_fell_has_no_delta(library: PythonLibrary) -> None:
    assert (
        peaks(USED + 5)["nvml_device_delta_bytes"] == "unavailable (the device's use fell by 5 bytes: others share it)"
    )


def test_a_delta_without_a_beginning_says_so(library: PythonLibrary) -> None:
    assert peaks(NOT_READ)["nvml_device_delta_bytes"] == str(NOT_READ)


def test_without_nvml_torch_alone_counts(library: PythonLibrary) -> None:
    library.fault("nvmlInitWithFlags", 9, 0, -1)
    found = peaks()

    assert (found["allocated_peak_bytes"], found["reserved_peak_bytes"]) == (ALLOCATED, RESERVED_PEAK)
    for name in ("nvml_process_bytes", "nvml_device_delta_bytes", "accounting_peak_bytes", "context_bytes"):
        assert found[name] == "unavailable (NVML: Driver Not Loaded)"
    assert found["attribution"] == "torch-only"


def test_a_lost_device_is_no_missing_number(library: PythonLibrary) -> None:
    library.fault("nvmlDeviceGetMemoryInfo_v2", 15, 0, -1)

    with pytest.raises(GpuLost, match=r"^GPU is lost: device GPU-one, in nvmlDeviceGetMemoryInfo$"):
        peaks()


def test_a_device_s_use_is_that_of_all_processes(library: PythonLibrary) -> None:
    assert memory.device_used_bytes("cuda:1") == USED
    assert memory.device_used_bytes("cpu") == Unavailable("the device is the CPU")
