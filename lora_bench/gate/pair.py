"""`Pair`: what one set of worker processes measured, round by round; processes and not rounds are what is replicated.

Each process has a bias of its own, by where its memory lies and what it shares a core with, to which every sample in it
is blind: an interval of one pair's samples says nothing of the next pair's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SIDES = ("base", "head", "control")
LOCATION, TAIL = 10, 90
"""The percentiles that stand for what a step takes and for what its worst steps take.

A neighbour's work makes some rounds slower and none quicker, so a low percentile is steadier than the median.
"""
LEAST_ROUNDS, LEAST_TAIL_ROUNDS = 20, 64


@dataclass(frozen=True)
class Pair:
    """Seconds by round of base, head and control, a second base; all three ran in every round, in random order.

    interrupted: by side, whether the system took the processor from it in that round; throttled: whether the device was
    slowed for heat or power meanwhile. Both are known without looking at the seconds. head_first: head was built before
    base.
    """

    base: Sequence[float]
    head: Sequence[float]
    control: Sequence[float]
    interrupted: Mapping[str, Sequence[bool]]
    head_first: bool = False
    throttled: bool = False

    def __post_init__(self) -> None:
        sides = {name: getattr(self, name) for name in SIDES}
        lengths = [len(each) for each in (*sides.values(), *(self.interrupted[name] for name in SIDES))]
        if len(set(lengths)) != 1 or lengths[0] < LEAST_ROUNDS:
            raise ValueError(f"a pair has at least {LEAST_ROUNDS} rounds, and of each side as many, got {lengths}")
        for name in SIDES:
            if odd := [value for value in getattr(self, name) if not 0 < value < math.inf]:
                raise ValueError(f"a pair's seconds are above 0 and finite, got {odd[0]} of {name}")

    @property
    def clean(self) -> list[int]:
        """The rounds in which nobody was interrupted."""
        marks = zip(*(self.interrupted[name] for name in SIDES), strict=True)
        return [number for number, each in enumerate(marks) if not any(each)]

    @property
    def restless(self) -> bool:
        """Whether most of its rounds were interrupted: something else ran beside it."""
        return len(self.clean) < max(len(self.base) / 2, LEAST_ROUNDS)

    @property
    def rounds(self) -> list[int]:
        """The rounds that count: the clean ones, or all where those are too few to say anything.

        All count as well where head was interrupted more often than base and control together: it then does it to
        itself, in threads of its own, and what it costs is not to be left out.
        """
        marks = {name: sum(self.interrupted[name]) for name in SIDES}
        by_itself = marks["head"] > marks["base"] + marks["control"]
        return list(range(len(self.base))) if self.restless or by_itself else self.clean

    @property
    def tells_tail(self) -> bool:
        """Whether a 90th percentile can be told from so many rounds."""
        return len(self.rounds) >= LEAST_TAIL_ROUNDS

    def log_ratio(self, percentile: int, side: str = "head") -> float:
        """The logarithm of that percentile of the side's seconds over base's."""
        rounds = self.rounds
        over = np.percentile(np.asarray(getattr(self, side))[rounds], percentile)
        return math.log(over / np.percentile(np.asarray(self.base)[rounds], percentile))

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; `Pair(**…)` reads it."""
        return dict(vars(self))
