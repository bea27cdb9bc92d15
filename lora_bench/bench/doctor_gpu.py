"""What can be measured on this GPU, and how it is set: read and told, never changed."""

from __future__ import annotations

import os

import torch

from lora_bench.bench import nvml, nvml_state
from lora_bench.bench.finding import Answer, Finding
from lora_bench.bench.machine import device_uuid
from lora_bench.bench.nvml import Unavailable

SHARED = " (of the whole GPU: its MIG instances share it)"


def examine_gpu(device: str) -> list[Finding]:
    """The findings on one CUDA device. Raises GpuLost, or RuntimeError where torch cannot use it."""
    torch.zeros(1, device=device)  # so that NVML has this process to show
    uuid = device_uuid(device)
    return [
        _finding("GPU", "yes", f"{torch.cuda.get_device_name(device)}, by torch {torch.__version__}"),
        _finding("device events", "yes", "time on the device itself"),
        _finding("CUDA graphs", "yes", "for short steps, whose launches would cost more than their work"),
        _finding("memory by torch", "yes", "allocated and reserved peaks, to the byte"),
        _device_memory(uuid),
        _process_memory(uuid),
        _accounting(uuid),
        _energy(uuid),
        _power(uuid),
        _clocks(uuid),
        _throttling(uuid),
        _mig(uuid),
        _settings(uuid),
        _reductions(),
    ]


def _finding(quantity: str, answer: Answer, why: str, help_: str = "") -> Finding:
    return Finding("GPU", quantity, answer, why, help_)


def _no(quantity: str, why: Unavailable, help_: str = "") -> Finding:
    return _finding(quantity, "no", why.reason, help_)


def _device_memory(uuid: str) -> Finding:
    memory = nvml.memory(uuid)
    if isinstance(memory, Unavailable):
        return _no("memory of the device", memory)
    text = f"{memory.used / 2**30:.1f} of {memory.total / 2**30:.1f} GiB in use, by all processes"
    if memory.reserved is None:
        return _finding("memory of the device", "partly", f"{text}, the driver's reserve included", "a newer driver")
    return _finding("memory of the device", "yes", text)


def _process_memory(uuid: str) -> Finding:
    name, own = "memory per process", nvml.process_bytes(uuid)
    if not isinstance(own, Unavailable):
        return _finding(name, "yes", f"NVML knows this process by its pid {os.getpid()}")
    others = nvml.processes(uuid)
    if not isinstance(others, Unavailable) and len(others) == 1 and None not in others.values():
        why = "NVML does not know this pid, but shows one process only: its bytes are taken for ours"
        return _finding(name, "partly", why, "in Docker: --pid=host")
    return _no(name, own, "in Docker: --pid=host; no other process on the GPU")


def _accounting(uuid: str) -> Finding:
    on = nvml_state.accounting_mode(uuid)
    if isinstance(on, Unavailable):
        return _no("exact process peak", on)
    if on:
        return _finding("exact process peak", "yes", "the driver's accounting is on")
    help_ = "an administrator's `nvidia-smi --accounting-mode=1`"
    return _finding("exact process peak", "no", "the driver's accounting is off", help_)


def _energy(uuid: str) -> Finding:
    joules = nvml.joules(uuid)
    if isinstance(joules, Unavailable):
        return _no("energy", joules, "a GPU of Volta's generation or later")
    why = "the GPU's own counter; windows of 10 s or more" + SHARED * joules.shared
    return _finding("energy", "partly" if joules.shared else "yes", why)


def _power(uuid: str) -> Finding:
    watts, limit = nvml.watts(uuid), nvml.power_limit_watts(uuid)
    if isinstance(watts, Unavailable):
        return _no("power", watts)
    limited = "" if isinstance(limit, Unavailable) else f", limit {limit:.0f} W"
    instant = watts.source == "nvml-power-instant"
    how = "of the instant" if instant else "an average, over 1 s on recent GPUs"
    why = f"{watts.value:.0f} W now, {how}{limited}{SHARED * watts.shared}"
    return _finding("power", "yes" if instant and not watts.shared else "partly", why)


def _clocks(uuid: str) -> Finding:
    clock, most = nvml.sm_clock_mhz(uuid), nvml.max_sm_clock_mhz(uuid)
    reasons, celsius = nvml_state.throttle_reasons(uuid), nvml_state.temperature_celsius(uuid)
    if isinstance(clock, Unavailable):
        return _no("clocks", clock)
    parts = [f"{clock.value:.0f} MHz now" + SHARED * clock.shared]
    parts += [] if isinstance(most, Unavailable) else [f"at most {most.value:.0f}"]
    parts += [] if isinstance(celsius, Unavailable) else [f"{celsius} degrees Celsius"]
    parts += [f"held down by: {', '.join(reasons)}"] if reasons and not isinstance(reasons, Unavailable) else []
    return _finding("clocks", "partly" if clock.shared else "yes", ", ".join(parts))


def _throttling(uuid: str) -> Finding:
    counters = nvml.throttle_counters(uuid)
    if isinstance(counters, Unavailable):
        return _no("throttle counters", counters, "a newer driver")
    unread = {name: value for name, value in counters.items() if isinstance(value, Unavailable)}
    if not unread:
        return _finding("throttle counters", "yes", f"all {len(counters)}: throttled runs are told from others")
    why = f"not read: {', '.join(unread)} ({next(iter(unread.values())).reason})"
    return _finding("throttle counters", "partly" if len(unread) < len(counters) else "no", why, "a newer driver")


def _mig(uuid: str) -> Finding:
    on = nvml_state.mig_mode(uuid)
    if isinstance(on, Unavailable):
        return _no("MIG", on)
    return _finding("MIG", "yes" if on else "no", f"the GPU is {'divided' if on else 'one piece'}")


def _settings(uuid: str) -> Finding:
    modes = {
        "driver": nvml.driver_version(uuid),
        "compute mode": nvml_state.compute_mode(uuid),
        "ECC": nvml_state.ecc_mode(uuid),
        "persistence": nvml_state.persistence_mode(uuid),
    }
    known = [f"{name} {_word(mode)}" for name, mode in modes.items() if not isinstance(mode, Unavailable)]
    answer: Answer = "yes" if len(known) == len(modes) else "partly" if known else "no"
    return _finding("settings", answer, ", ".join(known) or str(modes["driver"]))


def _word(mode: str | bool) -> str:
    if isinstance(mode, str):
        return mode
    return "on" if mode else "off"


def _reductions() -> Finding:
    matmul = torch.backends.cuda.matmul
    short = [name for name in ("fp16", "bf16") if getattr(matmul, f"allow_{name}_reduced_precision_reduction", False)]
    if short:
        why = f"torch may add up {' and '.join(short)} products in those types"
        help_ = "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False, and fp16's"
        return _finding("full reductions", "no", why, help_)
    return _finding("full reductions", "yes", "16-bit products are added up in float32")
