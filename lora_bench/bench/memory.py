"""Peak memory of one arm in one phase, in a process of its own; several numbers, never one."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_bench.bench import nvml
from lora_bench.bench.arm import tensors_of
from lora_bench.bench.machine import device_uuid
from lora_bench.bench.nvml import Unavailable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lora_bench.bench.arm import Arm, Step

DEVICE_QUANTITIES = (
    *("allocated_peak_bytes", "reserved_peak_bytes", "nvml_process_bytes", "nvml_device_delta_bytes"),
    *("accounting_peak_bytes", "context_bytes"),
)
NO_GPU = Unavailable("the device is the CPU")
NOT_READ = Unavailable("the device's use was not read before the process's work")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(
    arm: Arm, step: Step, device: str, *, train: bool, used_before: int | Unavailable = NOT_READ
) -> dict[str, Any]:
    """Bytes by quantity, each a number or the reason why there is none; the first call of `step` only warms up.

    CUDA: torch's allocated and reserved peaks; by NVML, right after the step, this process's bytes, how far the
    device's use has grown since `used_before` (`device_used_bytes` before the process did anything), and the peak of
    the process's whole life, where accounting is on; `context_bytes` is what NVML counts beyond torch's reserve now:
    the context, kernels and libraries' workspaces. CPU: the resident set's peak during the step, from the kernel. Both:
    parameters, and for training what autograd saved for backward beyond the parameters.

    `attribution` says whose count the best figure for the process is: the driver's "accounting", NVML's by this
    process's "pid" or for the only process there is ("sole-process": in a container NVML knows it by another pid), the
    growth of the whole device ("device-delta"), or "torch-only". Raises GpuLost.
    """
    step.prepare()
    step.run()
    found: dict[str, Any] = {"parameter_bytes": parameter_bytes(arm.model)}
    found |= _cuda_peaks(step, device, used_before) if device.startswith("cuda") else _resident_peaks(step)
    found["saved_tensor_bytes"] = saved_tensor_bytes(arm, step) if train else Unavailable("nothing is saved to infer")
    return {name: str(value) if isinstance(value, Unavailable) else value for name, value in found.items()}


def device_used_bytes(device: str) -> int | Unavailable:
    """Bytes in use on a CUDA device now, by all processes together."""
    if not device.startswith("cuda"):
        return NO_GPU
    memory = nvml.memory(device_uuid(device))
    return memory if isinstance(memory, Unavailable) else memory.used


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all that the model keeps: parameters, buffers, pooled adapters, packed codes and their statistics."""
    storages = {}
    for tensor in [*tensors_of(model), *_quantisation_state(model)]:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def _quantisation_state(model: nn.Module) -> list[Tensor]:
    """bitsandbytes keeps its block statistics beside the parameter, where torch does not see them."""
    states = [getattr(p, "quant_state", None) for p in model.parameters()]
    nested = [getattr(state, "state2", None) for state in states]
    fields = [vars(state).values() for state in (*states, *nested) if state is not None]
    return [value for values in fields for value in values if isinstance(value, torch.Tensor)]


def saved_tensor_bytes(arm: Arm, step: Step) -> int:
    """Bytes of the distinct storages that one training step saves for backward, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in arm.model.parameters()}
    saved: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # The tensor is kept, or its address could be used again within the step.
            saved[storage.data_ptr()] = storage.nbytes(), tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step.run()
    return sum(size for size, _ in saved.values())


def _cuda_peaks(step: Step, device: str, used_before: int | Unavailable) -> dict[str, Any]:
    step.prepare()
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # or what building the model took would count as reserved, and as this process's
    torch.cuda.reset_peak_memory_stats(device)
    step.run()
    torch.cuda.synchronize(device)
    in_nvml = _nvml_bytes(device, torch.cuda.memory_reserved(device), used_before)
    return {
        "allocated_peak_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_peak_bytes": torch.cuda.max_memory_reserved(device),
        "resident_peak_bytes": Unavailable("measured on the device instead"),
        **in_nvml,
    }


def _nvml_bytes(device: str, reserved: int, used_before: int | Unavailable) -> dict[str, Any]:
    """What NVML counts now, while torch has `reserved` bytes."""
    uuid = device_uuid(device)
    process, attribution = _own_process(uuid, reserved)
    delta = _growth(used_before, device_used_bytes(device))
    peak = nvml.accounting_peak_bytes(uuid)
    if not isinstance(peak, Unavailable):
        attribution = "accounting"
    elif isinstance(process, Unavailable):
        attribution = "torch-only" if isinstance(delta, Unavailable) else "device-delta"
    return {
        "nvml_process_bytes": process,
        "nvml_device_delta_bytes": delta,
        "accounting_peak_bytes": peak,
        "context_bytes": process if isinstance(process, Unavailable) else process - reserved,
        "attribution": attribution,
    }


def _own_process(uuid: str, reserved: int) -> tuple[int | Unavailable, str]:
    """NVML's count for this process, and by what it was known; never fewer bytes than torch has reserved."""
    counted, known_by = nvml.process_bytes(uuid), "pid"
    if isinstance(counted, Unavailable):
        others = nvml.processes(uuid)
        if isinstance(others, Unavailable) or len(others) != 1 or None in others.values():
            return counted, known_by
        counted, known_by = next(bytes_ for bytes_ in others.values() if bytes_ is not None), "sole-process"
    if counted < reserved:
        return Unavailable(f"NVML counts {counted:,} bytes for it, and torch alone has reserved {reserved:,}"), known_by
    return counted, known_by


def _growth(before: int | Unavailable, after: int | Unavailable) -> int | Unavailable:
    if isinstance(before, Unavailable):
        return before
    if isinstance(after, Unavailable):
        return after
    grown = after - before
    return grown if grown >= 0 else Unavailable(f"the device's use fell by {-grown:,} bytes: others share it")


def _resident_peaks(step: Step) -> dict[str, Any]:
    step.prepare()
    gc.collect()
    _return_freed_memory()
    reset = reset_resident_peak()
    step.run()
    return dict.fromkeys(DEVICE_QUANTITIES, NO_GPU) | {
        "resident_peak_bytes": resident_peak() if reset is None else reset,
        "attribution": "pid",
    }


def _return_freed_memory() -> None:
    """Give what malloc keeps back to the kernel, or building the model would count as the step's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def reset_resident_peak() -> Unavailable | None:
    """Set the kernel's peak mark of this process to its present resident set (proc(5), clear_refs, value 5)."""
    try:
        CLEAR.write_text("5")
    except OSError as error:
        return Unavailable(f"the kernel's peak mark cannot be reset: {error.strerror}")
    return None


def resident_peak() -> int | Unavailable:
    """The kernel's peak mark of this process, in bytes."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError as error:
        return Unavailable(f"the kernel's peak mark cannot be read: {error.strerror}")
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return Unavailable("/proc/self/status has no VmHWM")
