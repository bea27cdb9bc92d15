"""The smallest change that a runner can show, from how much equals differ on it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from lora_bench.gate.signed_rank import centre
from lora_bench.gate.verdict import ATTEMPTS, FAIL, INCONCLUSIVE, LOOKS, PASS, shown, shown_equal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_bench.gate.verdict import Margins

POWER = 0.9
DRAWS, MOST, STEP = 150, 1.0, 0.001


def smallest_change(equals: Sequence[float], margins: Margins) -> float:
    """The relative change that the gate would find about nine times in ten; infinite where that is over twofold.

    `equals` are the log-ratios of 7 or more pairs whose sides are the same: from their scatter both attempts are drawn,
    head's with the change on top and base's beside itself without. It is infinite too where the latter says too often
    that nothing can be told. Scatter that is told by few pairs is told roughly.

    Raises ValueError for fewer pairs.
    """
    count = len(equals)
    if count < LOOKS[0]:
        raise ValueError(f"scatter is told by {LOOKS[0]} pairs or more, got {count}")
    draw = np.random.default_rng(0)
    # Drawn from few values with replacement, scatter comes out too small by this.
    scatter = (np.asarray(equals) - centre(equals).median) * math.sqrt(count / (count - 1))
    heads, controls = (draw.choice(scatter, size=(DRAWS, ATTEMPTS, LOOKS[-1])) for _ in range(2))
    calm = [[_calm(values, margins) for values in both] for both in controls.tolist()]

    def found(change: float) -> bool:
        shifted = (heads + math.log1p(change)).tolist()
        trials = zip(shifted, calm, strict=True)
        seen = sum(all(_fails(*each, margins) for each in zip(*both, strict=True)) for both in trials)
        return seen >= POWER * DRAWS

    low, high = 0.0, MOST
    if not found(high):
        return math.inf
    while high - low > STEP:
        middle = (low + high) / 2
        low, high = (low, middle) if found(middle) else (middle, high)
    return high


def _calm(values: Sequence[float], margins: Margins) -> list[bool]:
    """At which looks base beside itself would let a verdict be given."""
    return [shown_equal(values[:look], margins) == PASS for look in LOOKS]


def _fails(values: Sequence[float], calm: Sequence[bool], margins: Margins) -> bool:
    """Whether an attempt ends with FAIL: at the first look at which anything can be told."""
    told = (shown(values[:look], margins) for look, may in zip(LOOKS, calm, strict=True) if may)
    return next((verdict for verdict in told if verdict != INCONCLUSIVE), INCONCLUSIVE) == FAIL


def noise_floor(equals: Sequence[float]) -> float:
    """The relative change that 99 of 100 comparisons of equals stay under, up or down, after the fewest pairs."""
    draw = np.random.default_rng(0)
    sets = draw.choice(np.asarray(equals), size=(DRAWS * 5, LOOKS[0])).tolist()
    return float(np.quantile([math.expm1(abs(centre(one).median)) for one in sets], 0.99))
