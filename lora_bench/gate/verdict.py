"""PASS, FAIL or INCONCLUSIVE: what pairs of processes have shown, and when enough have been seen.

A change counts that is both significant and large, and only if a second set of fresh pairs shows it again. Base runs
beside itself in every pair: where that differs, nothing can be said. The error rates are measured by
`lora_bench.gate.experiment`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_bench.bench.ratio import Interval
from lora_bench.gate.pair import LOCATION, TAIL, Pair
from lora_bench.gate.signed_rank import centre, p_above, p_below

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PASS, FAIL, INCONCLUSIVE = "PASS", "FAIL", "INCONCLUSIVE"
LOOKS = (7, 10, 14)
"""After so many pairs it is looked whether they suffice: 7 are the fewest of which all alike are one in 128."""
ALPHA = 0.01
ATTEMPTS = 2
REPLACED = 7
"""So many pairs that were interrupted or throttled are replaced.

Where more are interrupted the machine is like that, and they count; where more are throttled, nothing does.
"""
UNTIL_CALM = 2
"""So many where none was calm yet: steps that take long are interrupted in nearly every round, wherever they run."""
MOST_FAIL = 0.05
"""No calibration moves a margin for failing above this."""


class Margins(NamedTuple):
    """A change above `fail` fails, one below `accept` passes; between them both may be shown, and then it fails."""

    fail: float
    accept: float


LOCATION_MARGINS, TAIL_MARGINS = Margins(0.01, 0.03), Margins(0.02, 0.10)


@dataclass(frozen=True)
class Limits:
    """The margins of the location and of the tail."""

    location: Margins = LOCATION_MARGINS
    tail: Margins = TAIL_MARGINS

    def over(self, location: float, tail: float) -> Limits:
        """Margins moved up to the changes that equals show on a runner, if those are above them; at most to 5 %.

        What differs by more can be told by no margin: base beside itself will tell that nothing can be.
        """
        noisy = zip((self.location, self.tail), (location, tail), strict=True)
        ups = [(own, min(max(noise - own.fail, 0.0), MOST_FAIL - own.fail)) for own, noise in noisy]
        return Limits(*(Margins(own.fail + up, own.accept + up) for own, up in ups))

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; `Limits.of` reads it."""
        return {"location": self.location._asdict(), "tail": self.tail._asdict()}

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Limits:
        """The limits of a record."""
        return cls(Margins(**found["location"]), Margins(**found["tail"]))


@dataclass(frozen=True)
class Judgement:
    """What one quantity's log-ratios show; `change` is the estimated relative change with its interval."""

    verdict: str
    values: tuple[float, ...]
    change: Interval

    def __str__(self) -> str:
        return told(self.change)


def told(change: Interval) -> str:
    """A change in per cent: "+0.5 % [-0.1, +1.1]"; under 6 values know no interval."""
    if math.isinf(change.high):
        return f"{change.median:+.1%} [unbounded]".replace("%", " %")
    return f"{change.median:+.1%} [{100 * change.low:+.1f}, {100 * change.high:+.1f}]".replace("%", " %")


def shown(values: Sequence[float], margins: Margins) -> str:
    """FAIL where log-ratios are shown to be above the one margin, PASS where below the other."""
    if p_above(values, math.log1p(margins.fail)) <= ALPHA:
        return FAIL
    return PASS if p_below(values, math.log1p(margins.accept)) <= ALPHA else INCONCLUSIVE


def shown_equal(values: Sequence[float], margins: Margins) -> str:
    """PASS where log-ratios are shown to be off by less than may be accepted, up and down; FAIL where off by more."""
    verdicts = {shown(values, margins), shown([-value for value in values], margins)}
    return FAIL if FAIL in verdicts else PASS if verdicts == {PASS} else INCONCLUSIVE


def judge(values: Sequence[float], margins: Margins) -> Judgement:
    """What log-ratios show, with the change that they estimate."""
    estimate = centre(values)
    median, low, high = (math.expm1(value) for value in estimate[:3])
    change = Interval(median, low, high, estimate.confidence)
    return Judgement(shown(values, margins), tuple(values), change)


@dataclass
class Attempt:
    """A growing set of pairs, and what they show so far."""

    limits: Limits = Limits()
    pairs: list[Pair] = field(default_factory=list)
    quarantined: list[Pair] = field(default_factory=list)

    def add(self, pair: Pair) -> None:
        """Take the pair, or lay it aside: always if it was throttled, if interrupted while some may be replaced."""
        most = REPLACED if any(not each.restless for each in self.pairs) else UNTIL_CALM
        aside = pair.throttled or (pair.restless and len(self.quarantined) < most)
        (self.quarantined if aside else self.pairs).append(pair)

    @property
    def throttled(self) -> bool:
        """Whether too many pairs were throttled for anything to be told."""
        return sum(pair.throttled for pair in self.quarantined) > REPLACED

    @property
    def location(self) -> Judgement:
        return judge([pair.log_ratio(LOCATION) for pair in self.pairs], self.limits.location)

    @property
    def tail(self) -> Judgement | None:
        """By the pairs that have rounds enough; None where none has."""
        telling = [pair.log_ratio(TAIL) for pair in self.pairs if pair.tells_tail]
        return judge(telling, self.limits.tail) if telling else None

    @property
    def control(self) -> Judgement:
        """Base against itself, up and down."""
        found = judge([pair.log_ratio(LOCATION, "control") for pair in self.pairs], self.limits.location)
        return replace(found, verdict=shown_equal(found.values, self.limits.location))

    @property
    def verdict(self) -> str:
        if self.throttled or len(self.pairs) < LOOKS[0] or self.control.verdict != PASS:
            return INCONCLUSIVE
        verdicts = {self.location.verdict} | ({self.tail.verdict} if self.tail else set())
        return FAIL if FAIL in verdicts else PASS if verdicts == {PASS} else INCONCLUSIVE

    @property
    def settled(self) -> bool:
        """Whether no more pairs are wanted."""
        count = len(self.pairs)
        return self.throttled or count >= LOOKS[-1] or (count in LOOKS and self.verdict != INCONCLUSIVE)


@dataclass
class Comparison:
    """Head against base: one attempt, and after a failure a second one with fresh pairs, which must fail too."""

    limits: Limits = Limits()
    attempts: list[Attempt] = field(default_factory=list)

    def add(self, pair: Pair) -> None:
        """Take the next pair, into a new attempt where the last one has failed."""
        if not self.attempts or self.last.settled:
            self.attempts.append(Attempt(self.limits))
        self.last.add(pair)

    @property
    def settled(self) -> bool:
        """Whether no more pairs are wanted."""
        if not self.attempts or not self.last.settled:
            return False
        return len(self.attempts) == ATTEMPTS or self.last.verdict != FAIL

    @property
    def last(self) -> Attempt:
        return self.attempts[-1]

    @property
    def verdict(self) -> str:
        verdicts = [attempt.verdict for attempt in self.attempts]
        if FAIL not in verdicts:
            return verdicts[-1] if verdicts else INCONCLUSIVE
        return FAIL if verdicts == [FAIL] * ATTEMPTS else INCONCLUSIVE

    @property
    def because(self) -> str:
        """The verdict in words."""
        if not self.attempts:
            return "no pair was measured"
        last = self.last
        if self.verdict == PASS:
            faster = last.location.change.high < -last.limits.location.fail
            untold = "" if last.tail else ", the worst steps not judged"
            return ("faster" if faster else "no change that matters") + untold
        if self.verdict == FAIL:
            what = "slower" if last.location.verdict == FAIL else "slower at its worst"
            return f"{what}, and again with fresh pairs"
        if last.throttled:
            return f"{sum(pair.throttled for pair in last.quarantined)} pairs were throttled"
        if len(last.pairs) < LOOKS[0]:
            return f"it ended after {len(last.pairs)} pairs, and {LOOKS[0]} are the fewest that tell"
        if last.control.verdict != PASS:
            return f"base against itself differs by {last.control}, so nothing can be told here and now"
        if len(self.attempts) > 1:
            return "slower at first, but not again with fresh pairs"
        if self.attempts[0].verdict == FAIL:
            return "slower, but it ended before that was measured again"
        unsure = "the change" if last.location.verdict == INCONCLUSIVE else "the change at its worst"
        return f"{unsure} is neither shown to matter nor shown not to"
