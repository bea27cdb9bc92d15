"""`Result`: what is known of one row, and its place in the records."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_bench.bench.checked import check, row_of
from lora_bench.bench.ratio import Interval, bracketed_ratio, median_interval, paired_ratio
from lora_bench.bench.sampling import AFTER, BEFORE, NONE, Samples, undisturbed
from lora_bench.bench.workload import Row

if TYPE_CHECKING:
    from collections.abc import Iterable


class Proof(NamedTuple):
    """How many comparisons were made, the largest error beside its bound, and the least visibility of an adapter."""

    checks: int
    error_ratio: float
    visibility: float


@dataclass
class Result:
    """What is known of a row: its samples in order, the base's of the same rounds, memory and energy, or why not.

    Where it is not `interleaved` the base's are of two runs, before the row's (turn 0) and after them (turn 2).
    `parts` are the seconds of each part of a step that has parts, in the order of the samples. `launches` is what a GPU
    told beside them; on a CPU it stays empty, as it does where a worker has ended before.
    `kind` is what went wrong: "wrong" (it is not LoRA), "unproven" (its adapter cannot be told from rounding), "oom",
    "crashed", "timeout", "gpu_lost" or "error".
    """

    row: Row
    samples: Samples = NONE
    base: Samples = NONE
    beside: list[str] = field(default_factory=list)
    proof: Proof | None = None
    window: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, list[float]] = field(default_factory=dict)
    launches: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    energy: dict[str, Any] = field(default_factory=dict)
    kind: str = ""
    failure: str = ""
    interleaved: bool = True

    @property
    def not_comparable(self) -> bool:
        """Whether it failed only because this machine is not the one on which its run began."""
        return self.kind == "not_comparable"

    @property
    def measured(self) -> bool:
        return bool(self.samples.seconds)

    @property
    def pending(self) -> bool:
        """Whether its times are still to be taken."""
        return not (self.measured or self.failure)

    @property
    def shares_rounds(self) -> bool:
        """Whether its base ran in the same rounds."""
        return self.interleaved and bool(self.base.seconds)

    @property
    def rounds(self) -> list[int]:
        """The rounds that count: those in which neither this row nor the base was interrupted, if there are enough."""
        return undisturbed([self.samples, self.base] if self.shares_rounds else [self.samples])

    @property
    def seconds(self) -> list[float]:
        """Seconds of one step in the rounds that count."""
        return [self.samples.seconds[number] for number in self.rounds]

    @property
    def latency(self) -> Interval:
        """Median seconds of one step."""
        return median_interval(self.seconds)

    @property
    def ratio(self) -> Interval | None:
        """Median of seconds over the base's, round by round if they shared any; None where the base has none."""
        if not self.base.seconds:
            return None
        if not self.interleaved:
            return bracketed_ratio(self.seconds, *(_of_turn(self.base, turn) for turn in (BEFORE, AFTER)))
        return paired_ratio(self.seconds, [self.base.seconds[number] for number in self.rounds])

    @property
    def tokens_per_second(self) -> float:
        return self.row.workload.tokens / self.latency.median

    def timed(self) -> dict[str, Any]:
        """The record of its times."""
        return {
            "quantity": "latency",
            "samples_seconds": self.samples.seconds,
            "order": self.samples.turns,
            "interrupted": self.samples.interrupted,
            "base_samples_seconds": self.base.seconds,
            "base_order": self.base.turns,
            "base_interrupted": self.base.interrupted,
            "interleaved": self.interleaved,
            "interleaved_with": self.beside,
            "window": self.window,
            "parts_seconds": self.parts,
            "correctness": self.proof._asdict() if self.proof else None,
        }

    def failed(self) -> dict[str, Any]:
        """The record of why there is no more."""
        return {"quantity": "failure", "kind": self.kind, "text": self.failure}


def recorded(records: Iterable[dict[str, Any]]) -> dict[Row, Result]:
    """The results that records tell of. A row whose GPU was lost is one still to be measured.

    Raises ValueError for a record of any quantity that lacks what it should have or has it of another type, naming it,
    and for samples that no clock can have read, naming the row and the value.
    """
    results: dict[Row, Result] = {}
    for record in records:
        try:
            check(record)
            if record["quantity"] in ("latency", "launches", "memory", "energy", "failure"):
                row = row_of(record)
                _take(record, results.setdefault(row, Result(row)))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"a {record['quantity']} record lacks or has too much: {error}") from None
    return results


def _take(record: dict[str, Any], result: Result) -> None:
    match record["quantity"]:
        case "latency":
            result.samples, result.base = _samples(record, result.row), _samples(record, result.row, "base_")
            result.interleaved = record.get("interleaved", True)
            _check_base(result)
            result.beside = record["interleaved_with"]
            result.window, result.parts = record["window"], record.get("parts_seconds", {})
            for name, part in result.parts.items():
                if len(part) != len(result.samples.seconds):
                    counts = f"{len(part)} of {len(result.samples.seconds)}"
                    raise ValueError(f"{result.row}: every sample must have its part {name!r}, got {counts}")
            result.proof = Proof(**record["correctness"]) if record["correctness"] else None
        case "launches":
            result.launches = record["launches"]
            if empty := [name for name, found in result.launches.items() if found == []]:
                raise ValueError(f"{result.row}: launches must have samples, got none of {empty[0]}")
        case "memory":
            result.memory = record["memory"]
        case "energy":
            result.energy = record["energy"]
        case "failure" if record["kind"] != "gpu_lost":
            result.kind, result.failure = record["kind"], record["text"]


def _of_turn(samples: Samples, turn: int) -> list[float]:
    """The seconds that count of one run of a base."""
    own = [number for number, each in enumerate(samples.turns) if each == turn]
    seconds = [samples.seconds[number] for number in own]
    interrupted = [samples.interrupted[number] for number in own]
    return [seconds[number] for number in undisturbed([Samples(seconds, [], interrupted)])]


def _check_base(result: Result) -> None:
    own, base = len(result.samples.seconds), len(result.base.seconds)
    if result.interleaved and base not in (0, own):
        raise ValueError(f"{result.row}: it and its base must have equally many samples, got {own} and {base}")
    if not result.interleaved and base and set(result.base.turns) != {BEFORE, AFTER}:
        raise ValueError(f"{result.row}: a base around it must have the turns 0 and 2, got {result.base.turns[:9]}")


def _samples(record: dict[str, Any], row: Row, of: str = "") -> Samples:
    """The samples of a record: times above 0 that end, each with its turn and whether it was interrupted."""
    names = [f"{of}{name}" for name in ("samples_seconds", "order", "interrupted")]
    found = Samples(*(record[name] for name in names))
    lengths = [len(found.seconds), len(found.turns), len(found.interrupted)]
    if lengths[0] != lengths[2] or lengths[1] not in (0, lengths[0]):  # the turns of an old record are not known
        counts = ", ".join(f"{length} {name}" for name, length in zip(names, lengths, strict=True))
        raise ValueError(f"{row}: the samples must all have a turn and an interruption, got {counts}")
    if not found.seconds and not of:
        raise ValueError(f"{row}: a latency needs samples, got none")
    for number, seconds in enumerate(found.seconds):
        if isinstance(seconds, bool) or not isinstance(seconds, float | int) or not 0 < seconds <= sys.float_info.max:
            raise ValueError(f"{row}: {names[0]}[{number}] must be above 0 s and finite, got {seconds!r}")
    return found
