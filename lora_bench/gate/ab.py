"""Two sides compared on this machine now: pairs of fresh processes, until every workload's comparison is settled."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_bench.gate.environments import command
from lora_bench.gate.pair import Pair
from lora_bench.gate.verdict import FAIL, INCONCLUSIVE, Attempt, Comparison, Limits
from lora_bench.gate.workers import Broken, Server, Turns, rounds_in

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lora_bench.bench.workload import Workload
    from lora_bench.gate.environments import Side

ORDERS = [
    each
    for forward in (("base", "head", "control"), ("head", "control", "base"), ("control", "base", "head"))
    for each in (forward, forward[::-1])
]
NOT_JUDGED = ("not_offered", "not_used", "unproven", "gpu_lost", "protocol")
"""Failures that say nothing against a side."""
CHANCE = ("oom", "crashed", "timeout")
"""Failures that may be the machine's: they count when they come again, with the sides in the other order."""


@dataclass(eq=False)
class Duel:
    """One workload's comparison.

    `told`: what the sides' workers said of themselves; `broken`: what ended it early;
    `stumbled`: what went wrong once, and not again.

    With `wanted` so many pairs are measured, whatever they show, unless the device is throttled too often.
    """

    workload: Workload
    comparison: Comparison
    wanted: int = 0
    told: dict[str, Any] = field(default_factory=dict)
    broken: Broken | None = None
    stumbled: Broken | None = None

    @property
    def settled(self) -> bool:
        if not self.wanted or any(attempt.throttled for attempt in self.comparison.attempts):
            return self.broken is not None or self.comparison.settled
        return self.broken is not None or len(self.pairs) >= self.wanted

    def stumble(self, broken: Broken) -> None:
        """Note a failure: the first that may be the machine's is let pass."""
        if broken.kind in CHANCE and self.stumbled is None:
            self.stumbled = broken
        else:
            self.broken = broken

    @property
    def pairs(self) -> list[Pair]:
        """All pairs that count, of every attempt."""
        return [pair for attempt in self.comparison.attempts for pair in attempt.pairs]

    @property
    def verdict(self) -> str:
        """FAIL too where head cannot do what base can."""
        if self.broken is None:
            return self.comparison.verdict
        at_fault = self.broken.side == "head" and self.broken.kind not in NOT_JUDGED
        return FAIL if at_fault else INCONCLUSIVE

    @property
    def because(self) -> str:
        return str(self.broken) if self.broken is not None else self.comparison.because

    @property
    def lost(self) -> bool:
        """Whether the device itself went."""
        return self.broken is not None and self.broken.kind == "gpu_lost"

    def as_record(self, sides: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Ready for the records; `sides` is what is known of each."""
        attempts = [
            {name: [pair.as_dict() for pair in getattr(attempt, name)] for name in ("pairs", "quarantined")}
            for attempt in self.comparison.attempts
        ]
        return {
            "quantity": "ab",
            "subject": sides["head"]["subject"],
            "workload": self.workload.as_dict(),
            "fingerprint": self.told.get("head", {}).get("fingerprint", {}),
            **{name: {**sides[name], **self.told.get(name, {})} for name in ("base", "head")},
            "limits": self.comparison.limits.as_dict(),
            "attempts": attempts,
            "verdict": self.verdict,
            "because": self.because,
            "broken": self.broken is not None,
        }


def comparison_of(record: Mapping[str, Any]) -> Comparison:
    """The comparison that a record tells of.

    Raises ValueError for a record that is none, saying what is wrong with it.
    """
    try:
        limits = Limits.of(record["limits"])
        attempts = [
            Attempt(limits, **{name: [Pair(**pair) for pair in attempt[name]] for name in ("pairs", "quarantined")})
            for attempt in record["attempts"]
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"a record of a comparison lacks or has too much: {error}") from None
    return Comparison(limits, attempts)


def compare(
    base: Side,
    head: Side,
    duels: Sequence[Duel],
    device: str,
    *,
    pair_seconds: float,
    hear: Callable[[Duel], None],
) -> None:
    """Add pairs to the duels until all are settled; `hear` is told of each pair.

    Every pair has interpreters of its own, started anew: where the system lays a process's code and heap is a part of
    what differs between runs. Within a pair the duels come one after the other.
    """
    number, sides = 0, {"base": base, "head": head, "control": base}
    while left := [duel for duel in duels if not duel.settled]:
        with ExitStack() as stack:
            servers: dict[str, Server] = {}
            try:
                for name in order(number):
                    servers[name] = stack.enter_context(Server(name, *command(sides[name])))
                for server in servers.values():
                    server.warm_up()
            except Broken as broken:
                for duel in left:
                    duel.stumble(broken)
                left = []
            for duel in left:
                try:
                    duel.comparison.add(_pair(duel, servers, sides, device, pair_seconds, number))
                except Broken as broken:
                    duel.stumble(broken)
                hear(duel)
                if duel.lost:
                    return
        number += 1


def order(number: int) -> tuple[str, ...]:
    """In which order a pair's processes are started: all six in turn, each followed by its reverse.

    The one that started last has been seen to be quicker than the one that started first: no side may always be.
    """
    return ORDERS[number % len(ORDERS)]


def _pair(
    duel: Duel, servers: Mapping[str, Server], sides: Mapping[str, Side], device: str, seconds: float, number: int
) -> Pair:
    workers = {}
    try:
        for name in order(number):
            task = {"subject": sides[name].subject, "workload": duel.workload.as_dict(), "device": device}
            workers[name] = servers[name].start({**task, "own": sides[name].own})
            duel.told[name] = workers[name].ready()
        turns = Turns(workers, seed=number)
        turns.run(rounds_in(seconds, turns.round_seconds))
        first = order(number).index
        return turns.pair("head", head_first=first("head") < first("base"))
    finally:
        for worker in workers.values():
            worker.close()
