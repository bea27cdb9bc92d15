"""NVML's probes beside their faults (test_nvml_faults.py): how a device is found, and that nothing is left behind."""

from __future__ import annotations

import os
import pickle
from contextlib import suppress
from typing import TYPE_CHECKING

import pynvml
import pytest

from lora_bench.bench import nvml
from lora_bench.bench.nvml import GpuLost, Unavailable
from tests.fake_nvml import install

if TYPE_CHECKING:
    from tests.fake_nvml import PythonLibrary

UUID = "0c9f0d9e-1111-2222-3333-444455556666"


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> PythonLibrary:
    monkeypatch.setattr(pynvml, "_nvmlLib_refcount", 0)
    return install(monkeypatch)


def test_a_probe_is_about_this_process_unless_told_otherwise(library: PythonLibrary) -> None:
    library.set("pid 0", os.getpid())
    library.set("accounted pid", os.getpid())

    assert nvml.process_bytes("GPU-one") == 2 << 30
    assert nvml.accounting_peak_bytes("GPU-one") == 5 << 30


def test_the_device_is_found_by_uuid_with_nvml_s_prefix(
    library: PythonLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", seen.append)
    nvml.driver_version(UUID)
    nvml.driver_version(f"MIG-{UUID}")
    nvml.driver_version(f"GPU-{UUID}")

    assert seen == [f"GPU-{UUID}", f"MIG-{UUID}", f"GPU-{UUID}"]


@pytest.mark.parametrize(
    ("driver", "last"),
    [
        *((old, [269, 270, 271]) for old in ("", "535.104.05", "570.172.08", "574.99")),
        *((renumbered, [251, 252, 253]) for renumbered in ("575.51.03", "576.02", "580.65.06", "580.81")),
        *((now, [269, 270, 271]) for now in ("580.82.07", "580.105", "590.48.01", "1000.1")),
    ],
)
def test_some_drivers_number_the_counters_of_heat_and_power_brake_otherwise(driver: str, last: list[int]) -> None:
    assert nvml._throttle_numbers(driver) == [74, 76, *last]


@pytest.mark.parametrize("code", [0, pynvml.NVML_ERROR_UNKNOWN, pynvml.NVML_ERROR_GPU_IS_LOST])
def test_nvml_is_shut_down_whatever_a_probe_gives(library: PythonLibrary, code: int) -> None:
    library.fault("nvmlDeviceGetTotalEnergyConsumption", code, 0, 1)
    with suppress(GpuLost):
        nvml.joules("GPU-one")

    assert pynvml._nvmlLib_refcount == 0


def test_held_keeps_nvml_loaded_between_probes(library: PythonLibrary) -> None:
    with nvml.held():
        assert pynvml._nvmlLib_refcount == 1
        nvml.joules("GPU-one")
        assert pynvml._nvmlLib_refcount == 1
    assert pynvml._nvmlLib_refcount == 0


def test_a_binding_without_a_function_makes_it_unavailable(
    library: PythonLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption")

    assert nvml.joules("GPU-one") == Unavailable(
        "NVML: this release of nvidia-ml-py has no nvmlDeviceGetTotalEnergyConsumption"
    )


def test_a_lost_device_says_which_and_where_also_after_a_pipe() -> None:
    lost = pickle.loads(pickle.dumps(GpuLost("GPU-one", "nvmlInit", "GPU is lost")))  # noqa: S301  # our own bytes

    assert (lost.uuid, lost.call, lost.reason) == ("GPU-one", "nvmlInit", "GPU is lost")
    assert str(lost) == "GPU is lost: device GPU-one, in nvmlInit"


def test_what_is_unavailable_reads_as_such_and_is_no_number() -> None:
    value = Unavailable("NVML: Not Supported", 3)

    assert str(value) == "unavailable (NVML: Not Supported)"
    assert pickle.loads(pickle.dumps(value)) == value  # noqa: S301  # our own bytes
    assert Unavailable("no number of NVML's").code is None


def test_the_real_library_knows_no_such_device_or_is_not_there() -> None:
    value = nvml.process_bytes(UUID)

    assert isinstance(value, Unavailable)
    assert str(value).startswith("unavailable (NVML: ")
    assert value.code
