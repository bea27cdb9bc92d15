"""A known operation that takes a known share longer: what a gate must find, and what it must leave alone."""

from __future__ import annotations

import itertools

import torch

from lora_bench.bench.arm import Step

PRODUCTS, SIZE = 100, 64


def products(more: int = 0, *, seldom: int = 0) -> Step:
    """A hundred products of 64 x 64 matrices, and `more`: each is one per cent of work on top; every fifth `seldom`."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(SIZE, SIZE, generator=generator) for _ in range(2))
    held = [left, right, torch.empty(SIZE, SIZE)]
    turns = itertools.cycle((0, 0, 0, 0, seldom))

    @torch.inference_mode()
    def run() -> None:
        left, right, product = held
        for _ in range(PRODUCTS + more + next(turns)):
            torch.mm(left, right, out=product)

    def relocate() -> None:
        held[:] = [each.clone() for each in held]

    return Step(run, relocate=relocate)
