"""Implementations beside each other: the same workload, the same rounds, and ties where no difference is shown."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, NamedTuple

from lora_bench.bench.ratio import Interval, median_interval, paired_ratio
from lora_bench.bench.sampling import undisturbed
from lora_bench.bench.workload import BASE, PHASES, SETUPS, Workload

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from lora_bench.bench.result import Result

RULE = (
    "Subjects with the same workload are ordered by their medians over the rounds that they shared and in which none "
    "of them was interrupted. One ties with the fastest of its place when the 95 % interval of the ratio of the two, "
    "round by round, holds 1; the first that does not has the next place, and those after it are held against it. "
    "Ties do not pass on: of three, the first and the last may differ though the one between ties with either. "
    "Of twenty comparisons of equals one is expected to show a difference by chance. "
    "Correctness is the largest error of a layer as a share of what rounding explains: over 1 would be wrong."
)
ALONE = "not timed in the rounds of the others"


class Place(NamedTuple):
    """One subject's place: 1 for the fastest and all that tie with it; None where it has none, for `remark`.

    `against` are its seconds over those of the fastest of all, in the rounds that they shared.
    """

    result: Result
    place: int | None = None
    tied: bool = False
    latency: Interval | None = None
    against: Interval | None = None
    remark: str = ""

    @property
    def subject(self) -> str:
        return self.result.row.subject

    def __str__(self) -> str:
        """The place as it is printed: "1", "2 =" for one that is shared, or why there is none."""
        return self.remark if self.place is None else f"{self.place} =" if self.tied else str(self.place)


class Ranking(NamedTuple):
    """The subjects of one workload, the fastest first, those without a place last."""

    workload: Workload
    places: list[Place]

    @property
    def title(self) -> str:
        """What they did: "decode, batched r16 n8"."""
        of = self.workload
        adapters = [f"n{of.adapters}"] if of.setup == "batched" else []
        others = [word for word, usual in ((of.popularity, "distinct"), (of.targets, "all")) if word != usual]
        return " ".join([f"{of.phase}, {of.setup} r{of.rank}", *adapters, *others])


def rankings(results: Iterable[Result]) -> list[Ranking]:
    """A ranking for every workload that two or more subjects were asked for and one, at least, was measured in."""
    groups: dict[Workload, list[Result]] = {}
    for result in results:
        if result.row.subject != BASE:
            groups.setdefault(result.row.workload, []).append(result)
    compared = [own for own in groups.values() if len(own) > 1 and any(each.measured for each in own)]
    ranked = [Ranking(own[0].row.workload, _placed(own)) for own in compared]
    return sorted(ranked, key=lambda each: (PHASES.index(each.workload.phase), SETUPS.index(each.workload.setup)))


def correctness(result: Result) -> str:
    """What was proven of the very steps that were timed."""
    if result.kind == "wrong":
        return "wrong"
    return "not proven" if result.proof is None else f"{result.proof.error_ratio:.2g} of the bound"


def _placed(results: list[Result]) -> list[Place]:
    measured = [result for result in results if result.measured]
    together = max(_shared(measured), key=len)
    if len(together) == 1 < len(measured):
        together = []  # nobody took turns with another
    places = list(_ranked(together)) if together else []
    places += [Place(each, latency=each.latency, remark=ALONE) for each in measured if each not in together]
    return places + [Place(each, remark=each.kind or "not measured") for each in results if not each.measured]


def _shared(results: list[Result]) -> Iterator[list[Result]]:
    """Those that took turns with each other: they were timed beside the same samples of the base."""
    left = list(results)
    while left:
        of = left[0]
        beside = [each for each in left[1:] if of.shares_rounds and each.shares_rounds and each.base == of.base]
        own = [of, *(each for each in beside if len(each.samples.seconds) == len(of.samples.seconds))]
        yield own
        left = [each for each in left if each not in own]


def _ranked(results: list[Result]) -> Iterator[Place]:
    rounds = undisturbed([each.samples for each in results])
    seconds = {id(each): [each.samples.seconds[number] for number in rounds] for each in results}
    ordered = sorted(results, key=lambda each: statistics.median(seconds[id(each)]))
    for first, group in _ties([seconds[id(each)] for each in ordered]):
        for number in group:
            own = seconds[id(ordered[number])]
            against = paired_ratio(own, seconds[id(ordered[0])])
            yield Place(ordered[number], first + 1, len(group) > 1, median_interval(own), against)


def _ties(ordered: Sequence[Sequence[float]]) -> Iterator[tuple[int, range]]:
    """The first of each place, and all that have it: from it on, as long as they tie with it."""
    first = 0
    while first < len(ordered):
        after = first + 1
        while after < len(ordered) and ties(ordered[after], ordered[first]):
            after += 1
        yield first, range(first, after)
        first = after


def ties(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether no difference is shown: the interval of their ratio, round by round, holds 1."""
    ratio = paired_ratio(one, other)
    return ratio.low <= 1 <= ratio.high
