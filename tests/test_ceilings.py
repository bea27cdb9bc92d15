"""A device's ceilings, under a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lora_bench.bench import ceilings


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The readings that the clock gives, in order; small tensors, so that nothing takes long."""
    readings: list[float] = []

    def clock(run: Callable[[], object]) -> float:
        run()
        return readings.pop(0)

    monkeypatch.setattr(ceilings, "clock_of", lambda _device: clock)
    monkeypatch.setitem(ceilings.COPIED, "cpu", 1000)
    monkeypatch.setitem(ceilings.SIDE, "cpu", 10)
    return readings


def test_a_copy_counts_bytes_read_and_written_by_the_best_try_after_a_warm_up(clocked: list[float]) -> None:
    clocked += [0.001, *[4.0] * 6, 2.0]

    assert ceilings.copied("cpu") == 2 * 1000 / 2.0


def test_a_product_counts_multiplications_and_additions(clocked: list[float]) -> None:
    clocked += [0.001, *[4.0] * 6, 2.0]

    assert ceilings.multiplied("cpu", torch.float64) == 2 * 10**3 / 2.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_has_its_ceiling(clocked: list[float], dtype: torch.dtype) -> None:
    clocked += [1.0] * 16

    assert ceilings.measure_ceilings("cpu", dtype) == (2000.0, 2000.0)
