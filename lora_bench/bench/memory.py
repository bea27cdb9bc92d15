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

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(arm: Arm, step: Step, device: str, *, train: bool) -> dict[str, Any]:
    """Bytes by quantity, each a number or the reason why there is none; the first call of `step` only warms up.

    CUDA: torch's allocated and reserved peaks, and NVML's count of this process right after the step. CPU: the
    resident set's peak during the step, from the kernel. Both: parameters, and for training what autograd saved for
    backward beyond the parameters. `attribution` says whose count it is: this process's ("pid"), or torch's alone.
    """
    step.prepare()
    step.run()
    found: dict[str, Any] = {"parameter_bytes": parameter_bytes(arm.model)}
    measure = _cuda_peaks if device.startswith("cuda") else _resident_peaks
    found |= measure(step, device)
    found["saved_tensor_bytes"] = saved_tensor_bytes(arm, step) if train else Unavailable("nothing is saved to infer")
    return {name: str(value) if isinstance(value, Unavailable) else value for name, value in found.items()}


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


def _cuda_peaks(step: Step, device: str) -> dict[str, Any]:
    step.prepare()
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # or what building the model took would count as reserved, and as this process's
    torch.cuda.reset_peak_memory_stats(device)
    step.run()
    torch.cuda.synchronize(device)
    in_nvml = nvml.process_bytes(device_uuid(device))
    return {
        "allocated_peak_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_peak_bytes": torch.cuda.max_memory_reserved(device),
        "nvml_process_bytes": in_nvml,
        "resident_peak_bytes": Unavailable("measured on the device instead"),
        "attribution": "torch-only" if isinstance(in_nvml, Unavailable) else "pid",
    }


def _resident_peaks(step: Step, _device: str) -> dict[str, Any]:
    step.prepare()
    gc.collect()
    _return_freed_memory()
    reset = _reset_resident_peak()
    step.run()
    no_gpu = Unavailable("the device is the CPU")
    return {
        "allocated_peak_bytes": no_gpu,
        "reserved_peak_bytes": no_gpu,
        "nvml_process_bytes": no_gpu,
        "resident_peak_bytes": _resident_peak() if reset is None else reset,
        "attribution": "pid",
    }


def _return_freed_memory() -> None:
    """Give what malloc keeps back to the kernel, or building the model would count as the step's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_resident_peak() -> Unavailable | None:
    """Set the kernel's peak mark of this process to its present resident set (proc(5), clear_refs, value 5)."""
    try:
        CLEAR.write_text("5")
    except OSError as error:
        return Unavailable(f"the kernel's peak mark cannot be reset: {error.strerror}")
    return None


def _resident_peak() -> int | Unavailable:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError as error:
        return Unavailable(f"the kernel's peak mark cannot be read: {error.strerror}")
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return Unavailable("/proc/self/status has no VmHWM")
