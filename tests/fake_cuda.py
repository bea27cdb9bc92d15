"""A GPU made of two clocks, the host's and the device's, in the place of the functions of torch.cuda that are used."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import pytest

LAUNCH, KERNEL = 10e-6, 4e-6
"""Seconds that the host needs to launch, and a kernel to run."""
Effect = Callable[[], object]


class FakeCuda:
    """Launches put kernels into a queue, and a capture keeps them for later; `log` is what was asked, in order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.host = self.device = 0.0
        self.tape: list[Effect] | None = None
        self.log: list[str] = []
        self.forgets = False
        self.refuses = 0
        gpu = self

        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing

            def record(self, _stream: object) -> None:
                self.at = max(gpu.host, gpu.device)

            def synchronize(self) -> None:
                gpu.host = max(gpu.host, self.at)

            def elapsed_time(self, other: Event) -> float:
                return (other.at - self.at) * 1e3

        class Graph:
            def __init__(self) -> None:
                self.effects: list[Effect] = []

            def replay(self) -> None:
                gpu.log.append("replay")
                gpu.launch(lambda: [] if gpu.forgets else [effect() for effect in self.effects], len(self.effects))

        for name, value in {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": self.capture,
            "Stream": lambda device: SimpleNamespace(wait_stream=lambda _other: None),
            "current_stream": lambda device: SimpleNamespace(wait_stream=lambda _other: None),
            "stream": lambda _stream: nullcontext(),
            "device": lambda _device: nullcontext(),
            "synchronize": self.synchronize,
            "empty_cache": lambda: self.log.append("empty cache"),
            "is_current_stream_capturing": lambda: self.tape is not None,
            "get_sync_debug_mode": lambda: self.refuses,
            "set_sync_debug_mode": self.refuse,
            "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1000),
            "_sleep": lambda cycles: self.launch(lambda: None, cycles / 2e9 / KERNEL),
        }.items():
            patch.setattr(torch.cuda, name, value)

    def launch(self, effect: Effect, kernels: float = 1) -> None:
        """Put what takes as long as so many kernels into the queue."""
        if self.tape is not None:
            self.tape.append(effect)
            return
        self.host += LAUNCH
        self.device = max(self.device, self.host) + kernels * KERNEL
        effect()

    def refuse(self, mode: int | str) -> None:
        if mode == "error":
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)
        self.refuses = 2 if mode == "error" else int(mode)

    def read(self) -> None:
        """What torch knows to wait for the device, as reading a number from it does."""
        if self.refuses == 2:
            raise RuntimeError("called a synchronizing CUDA operation")
        self.synchronize()

    def synchronize(self, _device: object = None) -> None:
        if self.tape is not None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors might")
        self.host = max(self.host, self.device)

    @contextmanager
    def capture(self, graph: Any, *, stream: object) -> Iterator[None]:
        assert stream is not None
        self.log.append("capture")
        self.tape = graph.effects
        try:
            yield
        finally:
            self.tape = None
