"""Meters of energy: the GPU's over a library made here, the processor's over files made here."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pynvml
import pytest
import torch

from lora_bench.bench import meter as meters
from lora_bench.bench.meter import Meter, NvmlMeter, RaplMeter, meter_of
from lora_bench.bench.nvml import Unavailable
from tests.fake_nvml import install

if TYPE_CHECKING:
    from tests.fake_nvml import PythonLibrary

LARGEST = 262_143_328_850


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> PythonLibrary:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=str(device)[5:]))
    return install(monkeypatch)


def test_a_gpu_s_meter_reads_joules_and_watts(library: PythonLibrary) -> None:
    meter = meter_of("cuda:one")

    assert isinstance(meter, NvmlMeter)
    assert (meter.joules(), meter.watts()) == (123.456, 250.0)
    assert (meter.source, meter.attribution) == ("nvml-total-energy", "the GPU")


def test_a_mig_instance_s_meter_says_that_it_is_shared(library: PythonLibrary) -> None:
    meter = meter_of("cuda:MIG-part")

    assert isinstance(meter, NvmlMeter)
    assert meter.attribution == "the whole GPU, shared with its other MIG instances"


def test_a_gpu_that_counts_no_energy_has_no_meter(library: PythonLibrary) -> None:
    library.fault("nvmlDeviceGetTotalEnergyConsumption", pynvml.NVML_ERROR_NOT_SUPPORTED, 0, -1)

    assert meter_of("cuda:one") == Unavailable("NVML: Not Supported", 3)


def test_a_meter_s_later_trouble_is_said_too(library: PythonLibrary) -> None:
    meter = NvmlMeter("GPU-one", shared=False)
    library.fault("nvmlDeviceGetTotalEnergyConsumption", pynvml.NVML_ERROR_NO_PERMISSION, 0, -1)

    assert meter.joules() == Unavailable("NVML: Insufficient Permissions", 4)


def test_nvml_is_loaded_while_a_gpu_is_watched(library: PythonLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pynvml, "_nvmlLib_refcount", 0)
    with NvmlMeter("GPU-one", shared=False).every(lambda: None):
        assert pynvml._nvmlLib_refcount == 1
    assert pynvml._nvmlLib_refcount == 0


def test_a_watch_looks_at_the_beginning_from_a_thread_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "SECONDS_BETWEEN_LOOKS", 1e-4)
    seen: list[threading.Thread] = []
    often = threading.Event()

    def look() -> None:
        seen.append(threading.current_thread())
        if len(seen) == 5:
            often.set()

    with Meter().every(look):
        assert often.wait(timeout=30)
    there = len(seen)

    main = threading.current_thread()
    assert seen[0] is seen[-1] is main
    assert main not in seen[1:-1]
    assert len(seen) == there >= 6


def test_what_a_look_raises_in_its_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "SECONDS_BETWEEN_LOOKS", 1e-4)
    raised = threading.Event()

    def look() -> None:
        if threading.current_thread() is not threading.main_thread():
            raised.set()
            raise KeyError("from the thread")

    with pytest.raises(KeyError, match="from the thread"), Meter().every(look):
        assert raised.wait(timeout=30)


@pytest.fixture
def powercap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages, one with a zone of its cores inside, and the whole platform."""
    for zone, name in {
        "intel-rapl:0": "package-0",
        "intel-rapl:1": "package-1",
        "intel-rapl:0:0": "core",
        "intel-rapl:2": "psys",
    }.items():
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "name").write_text(f"{name}\n")
        (tmp_path / zone / "energy_uj").write_text("1000000\n")
        (tmp_path / zone / "max_energy_range_uj").write_text(f"{LARGEST}\n")
    monkeypatch.setattr(meters, "POWERCAP", tmp_path)
    return tmp_path


def shows(powercap: Path, zone: str, microjoules: int) -> None:
    (powercap / zone / "energy_uj").write_text(f"{microjoules}\n")


def rapl() -> RaplMeter:
    meter = meter_of("cpu")
    assert isinstance(meter, RaplMeter), meter
    return meter


def test_a_processor_s_joules_are_those_of_its_packages(powercap: Path) -> None:
    meter = rapl()
    for zone, more in {"intel-rapl:0": 3, "intel-rapl:1": 4, "intel-rapl:0:0": 100, "intel-rapl:2": 1000}.items():
        shows(powercap, zone, 1_000_000 * (1 + more))

    assert meter.joules() == 7.0
    assert isinstance(meter.watts(), Unavailable)
    assert (meter.source, meter.attribution) == ("rapl", "package, shared")


def test_a_counter_that_begins_again_goes_on(powercap: Path) -> None:
    shows(powercap, "intel-rapl:0", LARGEST - 2_000_000)
    meter = rapl()
    shows(powercap, "intel-rapl:0", 3_000_000)
    assert meter.joules() == 5.0
    shows(powercap, "intel-rapl:0", 4_000_000)
    assert meter.joules() == 6.0


def test_a_wrap_of_unknown_size_is_not_guessed(powercap: Path) -> None:
    (powercap / "intel-rapl:0" / "max_energy_range_uj").unlink()
    meter = rapl()
    assert meter.joules() == 0.0
    shows(powercap, "intel-rapl:0", 5)

    found = meter.joules()

    assert isinstance(found, Unavailable)
    assert "max_energy_range_uj cannot be read" in found.reason


def test_counters_for_root_only_say_which_file_and_what_helps(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = powercap / "intel-rapl:0" / "energy_uj", Path.read_text

    def refused(self: Path) -> str:
        if self == path:
            raise PermissionError(13, os.strerror(13), str(self))
        return read(self)

    monkeypatch.setattr(Path, "read_text", refused)

    assert meter_of("cpu") == Unavailable(
        f"{path} is for root only: an administrator can allow it with `chmod a+r {path}`"
    )


def test_a_machine_without_rapl_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "POWERCAP", tmp_path)

    assert meter_of("cpu") == Unavailable(
        f"{tmp_path} has no package of RAPL: a virtual machine, or its kernel module is not loaded"
    )
