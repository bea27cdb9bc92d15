"""Subjects that break what runs them, at once or in the middle of being timed; named by the path of this file."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_bench import REFERENCE
from lora_bench.bench.nvml import GpuLost
from lora_bench.reference import LoraLinear
from lora_bench.spec import LoraSpec
from lora_bench.subject import Subject

FAULTY = Path(__file__)
UNTIMED_CALLS = 2
"""Of one layer, before a decoding step is timed: its cache is filled, and it is proven."""


def at_once(fault: Callable[[], object]) -> Subject:
    """A subject whose `wrap` is the fault."""

    def wrap(base: nn.Module, spec: LoraSpec) -> Any:
        return fault()

    return replace(REFERENCE, name="faulty", wrap=wrap)


def later(fault: Callable[[], object], calls: int = UNTIMED_CALLS, *, training: bool = False) -> Subject:
    """A subject that computes LoRA for so many calls of a layer."""

    class Faulty(LoraLinear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += self.training == training
            if self.calls > calls:
                fault()
            return super().forward(x)

    return replace(REFERENCE, name="faulty", wrap=Faulty)


def raises(error: Exception) -> Callable[[], object]:
    def fault() -> object:
        raise error

    return fault


def stop_the_clock() -> None:
    time.perf_counter_ns = lambda: 0


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def segfault() -> None:
    ctypes.string_at(0)


LOST = GpuLost("GPU-0", "nvmlDeviceGetUtilizationRates", "GPU is lost")
MEMORY = at_once(raises(MemoryError("no host memory")))
CUDA_MEMORY = at_once(raises(torch.OutOfMemoryError("CUDA out of memory")))
CPU_MEMORY = at_once(lambda: torch.empty(2**60, dtype=torch.uint8))
STEP_MEMORY = later(raises(torch.OutOfMemoryError("CUDA out of memory")), calls=1)
TIMED_MEMORY = later(raises(MemoryError("no host memory")))
TIMED_CUDA_MEMORY = later(raises(torch.OutOfMemoryError("CUDA out of memory")))
KILLED = later(kill)
EXITS = at_once(lambda: os._exit(3))
LEAVES = later(lambda: sys.exit(0))
SEGFAULTS = later(segfault)
HANGS = at_once(signal.pause)
STEP_HANGS = later(signal.pause)
CLOCKLESS = later(stop_the_clock)
LOSES = at_once(raises(LOST))
STEP_LOSES = later(raises(LOST))
LAST_LOSES = later(raises(LOST), calls=0, training=True)
NO_DEVICE = at_once(raises(RuntimeError("CUDA error: no CUDA-capable device is detected")))
STEP_ECC = later(raises(torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")))
