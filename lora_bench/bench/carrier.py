"""Samples that were taken elsewhere, carried into pytest-benchmark bit for bit through its public interface."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


class SampleClock:
    """A virtual clock: it reads 0 before a round and the round's sample after it."""

    # pytest-benchmark stores a timer by its name and compares it between runs.
    __name__ = "lora_bench.sample_clock"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def __repr__(self) -> str:
        return self.__name__


CLOCK = SampleClock()


def carry(benchmark: Any, seconds: Sequence[float], extra_info: dict[str, Any]) -> None:
    """Give `seconds`, in order, to pytest-benchmark's fixture as its rounds, with `extra_info` beside them."""
    upcoming = iter(seconds)

    def rewind() -> None:
        CLOCK.now = 0.0

    def advance() -> None:
        CLOCK.now = next(upcoming)

    benchmark.extra_info.update(extra_info)
    benchmark.pedantic(advance, setup=rewind, rounds=len(seconds), iterations=1)
