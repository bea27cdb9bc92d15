"""The machine a figure was made on: figures of different machines are not compared."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lora_bench.bench import nvml, nvml_state
from lora_bench.bounds import Arithmetic

NARROW = {"fp16": torch.float16, "bf16": torch.bfloat16}


def fingerprint(device: str) -> dict[str, Any]:
    """What must be equal before two runs may be compared ("hard"), and what a reader wants to know ("soft")."""
    hard: dict[str, Any] = {
        "device": device.partition(":")[0],
        "device_name": device_name(device),
        "torch": torch.__version__,
    }
    soft: dict[str, Any] = {
        "python": platform.python_version(),
        "os": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "packages": {name: _version(name) for name in ("transformers", "peft", "bitsandbytes", "loralib", "triton")},
    }
    if device.startswith("cuda"):
        uuid = device_uuid(device)
        driver = nvml.driver_version(uuid)
        soft["uuid"] = None if isinstance(driver, nvml.Unavailable) else uuid  # as what NVML knows the device
        hard |= {
            "cuda": torch.version.cuda,
            "driver": str(driver),
            "power_limit_watts": _plain(nvml.power_limit_watts(uuid)),
            "ecc": _plain(nvml_state.ecc_mode(uuid)),
            "mig": _plain(nvml_state.mig_mode(uuid)),
            "compute_mode": _plain(nvml_state.compute_mode(uuid)),
            "kernels": kernels(),
        }
    else:
        hard |= {"instructions": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    return {"hard": hard, "soft": soft}


def kernels() -> str:
    """From what torch may choose its kernels on CUDA, and how they may round: settings of this process, in words."""
    cuda = torch.backends.cuda
    attention = {
        "flash": cuda.flash_sdp_enabled(),
        "memory-efficient": cuda.mem_efficient_sdp_enabled(),
        "cuDNN": cuda.cudnn_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
    }
    full = not Arithmetic.of(torch.float32, "cuda").operand
    short = [name for name, dtype in NARROW.items() if Arithmetic.of(dtype, "cuda").partials]
    library = str(cuda.preferred_blas_library()).rpartition(".")[2]
    return (
        f"products by {library}, attention by {_listed(attention)}, "
        f"float32 operands {'kept' if full else 'rounded'}, {' and '.join(short) or 'no'} sums in parts"
    )


def device_name(device: str) -> str:
    """The processor's or the GPU's own name."""
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device_uuid(device: str) -> str:
    """The CUDA device's UUID, as NVML knows it."""
    return str(torch.cuda.get_device_properties(device).uuid)


def _listed(enabled: dict[str, bool]) -> str:
    return " or ".join(name for name, on in enabled.items() if on) or "none"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, nvml.Unavailable) else value
