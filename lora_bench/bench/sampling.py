"""Sampling: steps that take turns, until the noise between them is known; nothing is dropped for being slow."""

from __future__ import annotations

import gc
import math
import random
import resource
import statistics
import time
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lora_bench.bench.arm import Step

Key = TypeVar("Key")

WARM_UP_ROUNDS, MOST_WARM_UP_ROUNDS = 2, 10
LEAST_ROUNDS, MOST_ROUNDS = 10, 700
STEADY_ROUNDS = 64
"""From so many samples on a 90th percentile means something (and from 662 on a 99th), and the noise is looked at."""
STEADY = 0.1
"""The noise is known when two thirds of the rounds would have told the same, within this share of it."""
ROUNDS_IN_PLACE = 2


class Samples(NamedTuple):
    """One step's seconds in the order in which they were taken.

    `turns` are its places within the rounds, 0 for the first; `interrupted` says of each sample whether the operating
    system took the processor away from it (an involuntary context switch), which is known without looking at the time.
    """

    seconds: list[float]
    turns: list[int]
    interrupted: list[bool]


NONE = Samples([], [], [])
BEFORE, BETWEEN, AFTER = 0, 1, 2
"""The turns of samples that share no round: of a base before a row, of the row, and of the base after it."""


def interleave(
    steps: Mapping[Key, Step],
    clock: Callable[[Callable[[], object]], float],
    *,
    budget_seconds: float,
    relocating: bool,
    holding: Callable[[Key], None] = lambda _key: None,
    steady: bool = True,
) -> dict[Key, Samples]:
    """Time every step once in each round, in seeded random order within the round.

    It warms up until a round is no longer faster than the fastest before it, or `budget_seconds` are over. There are
    at least 10 rounds, and then more until `budget_seconds` are over, or the noise of every step is steady (which takes
    64), or 700 are done. With `relocating` every other round finds the weights at other places in memory. `holding` is
    told which step comes next.

    Raises ValueError where the clock reads 0 seconds, less, or no number.
    """
    order, samples = random.Random(0), {key: Samples([], [], []) for key in steps}

    def relocate(turn: int) -> None:
        if relocating and turn % ROUNDS_IN_PLACE == 0:
            for key in order.sample(list(steps), len(steps)):
                holding(key)
                steps[key].relocate()

    gc.collect()
    started = time.monotonic()
    totals: list[float] = []
    while len(totals) < WARM_UP_ROUNDS or (
        totals[-1] < min(totals[:-1])
        and len(totals) < MOST_WARM_UP_ROUNDS
        and time.monotonic() - started < budget_seconds
    ):
        relocate(len(totals))
        totals.append(sum(taken for _, taken, _ in _round(steps, clock, order, holding)))
    for turn in range(MOST_ROUNDS):
        if turn >= LEAST_ROUNDS and time.monotonic() - started > budget_seconds:
            break
        if (
            steady
            and turn >= STEADY_ROUNDS
            and turn % 8 == 0
            and all(is_steady(each.seconds) for each in samples.values())
        ):
            break
        relocate(turn)
        for place, (key, taken, interrupted) in enumerate(_round(steps, clock, order, holding)):
            samples[key].seconds.append(taken)
            samples[key].turns.append(place)
            samples[key].interrupted.append(interrupted)
    return samples


def _round(
    steps: Mapping[Key, Step],
    clock: Callable[[Callable[[], object]], float],
    order: random.Random,
    holding: Callable[[Key], None],
) -> list[tuple[Key, float, bool]]:
    taken = []
    for key in order.sample(list(steps), len(steps)):
        holding(key)
        steps[key].prepare()
        before = interruptions()
        seconds = clock(steps[key].run)
        if not 0 < seconds < math.inf:
            raise ValueError(f"a step takes more than 0 s and ends, got {seconds:g} s by its clock")
        taken.append((key, seconds, interruptions() > before))
    return taken


def interruptions() -> int:
    """How often the system has taken the processor away from this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def noise(seconds: Sequence[float]) -> float:
    """The interquartile range as a share of the median."""
    low, middle, high = statistics.quantiles(seconds, n=4)
    return (high - low) / middle


def is_steady(seconds: Sequence[float]) -> bool:
    """Whether the noise would have been told the same by the first two thirds of the samples.

    No noise at all is none that is known: half of the samples being equal says that the clock cannot tell them apart.
    """
    now = noise(seconds)
    return now > 0 and abs(noise(seconds[: 2 * len(seconds) // 3]) - now) <= STEADY * now


def undisturbed(samples: Sequence[Samples]) -> list[int]:
    """The rounds in which none of these was interrupted; all of them where fewer than the least are left.

    What takes long is interrupted nearly always, and then says nothing.
    """
    rounds = range(len(samples[0].seconds))
    clean = [number for number in rounds if not any(each.interrupted[number] for each in samples)]
    return clean if len(clean) >= LEAST_ROUNDS else list(rounds)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, and p90 from 64 samples on, p99 from 662 (MLPerf's early-stopping rule): fewer do not know them.

    Source: MLCommons, MLPerf Inference Rules, appendix on early stopping.
    """
    known = {"p50": statistics.median(seconds)}
    for name, least, share in (("p90", STEADY_ROUNDS, 90), ("p99", 662, 99)):
        if len(seconds) >= least:
            known[name] = statistics.quantiles(seconds, n=100, method="inclusive")[share - 1]
    return known
