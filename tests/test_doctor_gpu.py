"""What the doctor says of a GPU that exists only here."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pynvml
import pytest
import torch

from lora_bench.bench.doctor import examine
from lora_bench.bench.finding import Finding
from lora_bench.commands.doctor import render
from tests.fake_nvml import install

if TYPE_CHECKING:
    from tests.fake_nvml import PythonLibrary


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> PythonLibrary:
    """A machine with one GPU, whose driver tells everything and knows this process by its pid."""
    library = install(monkeypatch)
    library.set("pid 0", os.getpid())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "zeros", lambda *_shape, device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(uuid="one"))
    return library


def found(device: str) -> dict[str, Finding]:
    return {finding.quantity: finding for finding in examine(device, Path())}


def said(findings: dict[str, Finding], quantity: str) -> tuple[str, str]:
    return findings[quantity].answer, findings[quantity].why


def test_a_gpu_that_tells_everything(library: PythonLibrary) -> None:
    findings = found("cuda")

    assert said(findings, "GPU") == ("yes", f"A GPU, by torch {torch.__version__}")
    assert said(findings, "NVML") == ("yes", "it shows 1 GPU")
    assert said(findings, "memory of the device") == ("yes", "3.0 of 80.0 GiB in use, by all processes")
    assert said(findings, "exact process peak") == ("yes", "the driver's accounting is on")
    assert said(findings, "power") == ("yes", "250 W now, of the instant, limit 700 W")
    assert said(findings, "clocks") == (
        "yes",
        "1410 MHz now, at most 1980, 45 degrees Celsius, held down by: software power cap, hardware thermal slowdown",
    )
    assert said(findings, "MIG") == ("no", "the GPU is one piece")
    assert said(findings, "settings") == (
        "yes",
        "driver 580.82, compute mode exclusive process, ECC on, persistence off",
    )
    for quantity in ("device events", "CUDA graphs", "memory per process", "energy", "throttle counters"):
        assert findings[quantity].answer == "yes"


@pytest.mark.parametrize(
    ("values", "quantity", "answer", "why", "helping"),
    [
        ({"accounting": 0}, "exact process peak", "no", "accounting is off", "nvidia-smi --accounting-mode=1"),
        ({"code 271": 3}, "throttle counters", "partly", "not read: power_brake_ns (NVML: field 271", "newer driver"),
        ({"code 186": 3}, "power", "partly", "300 W now, an average", ""),
        ({"mig": 1}, "MIG", "yes", "the GPU is divided", ""),
        ({"used": 2**64 - 1}, "memory of the device", "no", "does not tell used memory", ""),
    ],
)
def test_what_a_gpu_does_not_tell_says_why_and_what_would_help(
    library: PythonLibrary, values: dict[str, int], quantity: str, answer: str, why: str, helping: str
) -> None:
    for name, value in values.items():
        library.set(name, value)
    finding = next(each for each in examine("cuda:0", Path()) if each.section == "GPU" and each.quantity == quantity)

    assert finding.answer == answer
    assert why in finding.why
    assert helping in finding.help


@pytest.mark.parametrize(
    ("values", "answer", "why"),
    [
        ({}, "yes", "NVML knows this process by its pid"),
        ({"pid 0": 70_000}, "partly", "shows one process only"),
        ({"pid 0": 70_000, "processes": 2}, "no", "in a container NVML shows host pids"),
    ],
)
def test_memory_of_a_process_on_a_gpu(library: PythonLibrary, values: dict[str, int], answer: str, why: str) -> None:
    for name, value in values.items():
        library.set(name, value)
    (finding,) = (each for each in examine("cuda", Path()) if each[:2] == ("GPU", "memory per process"))

    assert finding.answer == answer
    assert why in finding.why


def test_a_mig_instance_shares_what_the_gpu_has_one_of(library: PythonLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(uuid="MIG-part"))
    findings = found("cuda")

    for quantity in ("energy", "power", "clocks"):
        assert findings[quantity].answer == "partly"
        assert "its MIG instances share it" in findings[quantity].why
    assert findings["memory of the device"].answer == "yes"


def test_a_lost_gpu_is_a_finding_and_the_rest_is_told(library: PythonLibrary) -> None:
    library.fault("nvmlDeviceGetTotalEnergyConsumption", pynvml.NVML_ERROR_GPU_IS_LOST, 0, -1)
    findings = found("cuda")

    assert said(findings, "GPU") == ("no", "GPU is lost: device GPU-one, in nvmlDeviceGetTotalEnergyConsumption")
    assert findings["wall clock"].answer == "yes"


def test_a_gpu_that_torch_cannot_use_is_a_finding(library: PythonLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_shape: int, device: str) -> None:
        raise RuntimeError(f"CUDA error: {device} is busy\nand many lines of advice")

    monkeypatch.setattr(torch, "zeros", busy)

    assert said(found("cuda"), "GPU") == ("no", "CUDA error: cuda is busy")


def test_the_table_fits_and_names_everything(library: PythonLibrary) -> None:
    findings = examine("cuda", Path())
    lines = render("cuda", findings).splitlines()

    assert lines[0] == "What can be measured here, device=cuda"
    assert max(map(len, lines)) <= 100
    assert [line for line in lines if line.isupper() and " " not in line] == ["GPU", "CPU", "MACHINE", "SOFTWARE"]
    for finding in findings:
        assert re.search(rf"^  {re.escape(finding.quantity)} +{finding.answer} ", "\n".join(lines), re.MULTILINE)
