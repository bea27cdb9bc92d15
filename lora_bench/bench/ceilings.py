"""A device's ceilings, measured: how fast it copies, and how fast it multiplies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lora_bench.bench.clock import clock_of
from lora_bench.bench.counts import Ceilings

if TYPE_CHECKING:
    from collections.abc import Callable

COPIED = {"cpu": 1 << 28, "cuda": 1 << 31}
"""Bytes of the tensor that is copied: several times the largest cache."""
SIDE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the matrices that are multiplied."""
TRIES, SECONDS = 7, 1.0


def measure_ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """The best of several copies and products in one dtype, on random data: zeros draw less power and run faster.

    It takes two seconds or more. On a CPU it uses as many threads as torch does now.
    """
    return Ceilings(copied(device), multiplied(device, dtype))


def copied(device: str) -> float:
    """Bytes a second, read and written ones counted."""
    size = COPIED[device.partition(":")[0]]
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / best(clock_of(device), lambda: target.copy_(source))


def multiplied(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a product of square matrices."""
    side = SIDE[device.partition(":")[0]]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    return float(2 * side**3 / best(clock_of(device), lambda: torch.mm(a, b, out=product)))


def best(clock: Callable[[Callable[[], object]], float], run: Callable[[], object]) -> float:
    """The least seconds of at least seven runs over at least a second, after one that warms up."""
    clock(run)
    taken: list[float] = []
    while len(taken) < TRIES or sum(taken) < SECONDS:
        taken.append(clock(run))
    return min(taken)
