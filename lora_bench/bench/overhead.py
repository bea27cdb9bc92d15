"""What measuring itself costs: `python -m lora_bench.bench.overhead`.

An operation of about 2 ms is timed by the harness and by a bare loop, taking turns in one run; and once more with a
busy wait of exactly 5 % of its time behind it, which the harness must report as 5 %.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, NamedTuple

import torch

from lora_bench.bench.arm import Step
from lora_bench.bench.clock import wall_clock
from lora_bench.bench.ratio import Interval, paired_ratio
from lora_bench.bench.sampling import Samples, interleave, undisturbed

if TYPE_CHECKING:
    from collections.abc import Callable

PLANTED = 0.05
SIDE = 384


class Overhead(NamedTuple):
    """The harness's time over the bare loop's, and the slowed operation's over the operation's."""

    harness: Interval
    planted: Interval
    rounds: int


def measure_overhead(operation: Callable[[], object], budget_seconds: float = 30.0) -> Overhead:
    """Both ratios for an operation, round by round; the order within a round is random, as in every run."""
    bare: list[float] = []

    def bare_loop() -> None:
        start = time.perf_counter_ns()
        operation()
        bare.append((time.perf_counter_ns() - start) / 1e9)

    warm = [wall_clock(operation) for _ in range(50)]
    wait = PLANTED * sorted(warm)[len(warm) // 2] * 1e9

    def slowed() -> None:
        operation()
        until = time.perf_counter_ns() + wait
        while time.perf_counter_ns() < until:
            pass

    steps = {"harness": Step(operation), "bare": Step(bare_loop), "planted": Step(slowed)}
    taken = interleave(steps, wall_clock, budget_seconds=budget_seconds, relocating=False, steady=False)
    by_loop = taken["bare"]._replace(seconds=bare[-len(taken["bare"].seconds) :])
    harness = _ratio(taken["harness"], by_loop)
    planted = _ratio(taken["planted"], taken["harness"])
    return Overhead(harness, planted, len(bare))


def _ratio(one: Samples, other: Samples) -> Interval:
    rounds = undisturbed([one, other])
    return paired_ratio([one.seconds[number] for number in rounds], [other.seconds[number] for number in rounds])


def main() -> int:
    """Print both; exit code 1 where the harness is off by 1 %, or the planted 5 % by half a per cent."""
    torch.set_num_threads(1)
    a, b = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    found = measure_overhead(lambda: torch.mm(a, b))
    for name, ratio, wanted, within in (
        ("harness / bare loop", found.harness, 1.0, 0.01),
        ("with a busy wait of 5 %", found.planted, 1 + PLANTED, 0.005),
    ):
        text = f"{ratio.median - 1:+.2%} [{ratio.low - 1:+.2%}, {ratio.high - 1:+.2%}]"
        print(f"{name:<24} {text:<28} wanted {wanted - 1:+.1%} within {within:.1%}")
    print(f"{found.rounds} rounds, torch {torch.__version__}, one thread; a product of {SIDE} x {SIDE} matrices")
    return int(abs(found.harness.median - 1) > 0.01 or abs(found.planted.median - 1 - PLANTED) > 0.005)


if __name__ == "__main__":
    sys.exit(main())
