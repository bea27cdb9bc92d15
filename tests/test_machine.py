"""The fingerprint: what must be equal before figures are compared, and what is only told."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lora_bench.bench import machine, nvml, nvml_state
from lora_bench.bench.nvml import Unavailable


def test_a_cpu_is_known_by_its_name_instructions_threads_and_torch() -> None:
    assert machine.fingerprint("cpu")["hard"] == {
        "device": "cpu",
        "device_name": machine.device_name("cpu"),
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def test_the_fingerprint_is_the_same_twice_and_survives_json() -> None:
    first = machine.fingerprint("cpu")

    assert json.loads(json.dumps(first)) == first == machine.fingerprint("cpu")


def test_versions_are_told_and_that_of_a_missing_package_is_none() -> None:
    assert machine.fingerprint("cpu")["soft"]["packages"]["transformers"].startswith("5.")
    assert machine._version("no-such-package-anywhere") is None


def test_a_processor_s_name_is_the_kernel_s_or_else_the_platform_s(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A Processor: 3 GHz\nmodel name\t: another\n")
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path / "cpuinfo")
    assert machine.device_name("cpu") == "A Processor: 3 GHz"

    monkeypatch.setattr(machine, "Path", lambda _: tmp_path / "absent")
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert machine.device_name("cpu") == "riscv64"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"uuid {device}"))
    monkeypatch.setattr(nvml, "driver_version", {"uuid cuda:1": "580.1"}.__getitem__)
    monkeypatch.setattr(nvml, "power_limit_watts", {"uuid cuda:1": 700.0}.__getitem__)
    monkeypatch.setattr(nvml_state, "ecc_mode", {"uuid cuda:1": True}.__getitem__)
    monkeypatch.setattr(nvml_state, "mig_mode", {"uuid cuda:1": False}.__getitem__)
    monkeypatch.setattr(nvml_state, "compute_mode", {"uuid cuda:1": "default"}.__getitem__)


def test_a_gpu_is_known_by_its_name_driver_cuda_and_power_limit_whatever_its_index(cuda: None) -> None:
    hard, soft = machine.fingerprint("cuda:1").values()

    assert soft["uuid"] == "uuid cuda:1"
    assert hard == {
        "device": "cuda",
        "device_name": "GPU cuda:1",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": "580.1",
        "power_limit_watts": 700.0,
        "ecc": True,
        "mig": False,
        "compute_mode": "default",
        "kernels": machine.kernels(),
    }


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """torch's settings of CUDA kernels, all as they are at first."""
    cuda = torch.backends.cuda
    monkeypatch.setattr(cuda, "preferred_blas_library", lambda: torch._C._BlasBackend.Cublas)
    for name in ("flash", "mem_efficient", "cudnn", "math"):
        monkeypatch.setattr(cuda, f"{name}_sdp_enabled", lambda: True)
    matmul = {"fp32_precision": "none", "allow_fp16_accumulation": False}
    matmul |= {f"allow_{name}_reduced_precision_reduction": True for name in machine.NARROW}
    monkeypatch.setattr(cuda, "matmul", SimpleNamespace(**matmul))
    return monkeypatch


AT_FIRST = (
    "products by Cublas, attention by flash or memory-efficient or cuDNN or math, float32 operands kept, "
    "fp16 and bf16 sums in parts"
)


@pytest.mark.parametrize(
    ("where", "name", "value", "before", "after"),
    [
        ("", "flash_sdp_enabled", lambda: False, "flash or memory", "memory"),
        ("", "cudnn_sdp_enabled", lambda: False, " or cuDNN", ""),
        ("", "preferred_blas_library", lambda: torch._C._BlasBackend.Cublaslt, "Cublas,", "Cublaslt,"),
        ("matmul", "fp32_precision", "tf32", "operands kept", "operands rounded"),
        ("matmul", "allow_fp16_reduced_precision_reduction", False, "fp16 and bf16 sums", "bf16 sums"),
    ],
)
def test_the_choice_of_kernels_is_told_by_torch_s_settings(
    settings: pytest.MonkeyPatch, where: str, name: str, value: object, before: str, after: str
) -> None:
    assert machine.kernels() == AT_FIRST

    settings.setattr(getattr(torch.backends.cuda, where) if where else torch.backends.cuda, name, value)

    assert machine.kernels() == AT_FIRST.replace(before, after)


def test_what_nvml_does_not_tell_is_a_text_with_the_reason(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "driver_version", lambda _: Unavailable("no driver"))
    monkeypatch.setattr(nvml, "power_limit_watts", lambda _: Unavailable("no permission"))
    hard, soft = machine.fingerprint("cuda:1").values()

    assert soft["uuid"] is None
    assert (hard["driver"], hard["power_limit_watts"]) == ("unavailable (no driver)", "unavailable (no permission)")
