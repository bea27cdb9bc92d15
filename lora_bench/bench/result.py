"""`Result`: what is known of one row, and its place in the records."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_bench.bench.proof import Proof
from lora_bench.bench.ratio import Interval, median_interval, paired_ratio
from lora_bench.bench.sampling import Samples, undisturbed
from lora_bench.bench.workload import Row, Workload

if TYPE_CHECKING:
    from collections.abc import Iterable

NONE = Samples([], [], [])


@dataclass
class Result:
    """What is known of a row: its samples in order, the base's of the same rounds, memory and energy, or why not.

    `kind` is what went wrong: "wrong" (it is not LoRA), "oom", "crashed", "timeout", "gpu_lost" or "error".
    """

    row: Row
    samples: Samples = NONE
    base: Samples = NONE
    beside: list[str] = field(default_factory=list)
    proof: Proof | None = None
    window: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    energy: dict[str, Any] = field(default_factory=dict)
    kind: str = ""
    failure: str = ""

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
    def rounds(self) -> list[int]:
        """The rounds that count: those in which neither this row nor the base was interrupted, if there are enough."""
        return undisturbed([self.samples, self.base] if self.base.seconds else [self.samples])

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
        """Median of seconds over the base's, round by round; None where the base has none."""
        if not self.base.seconds:
            return None
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
            "interleaved_with": self.beside,
            "window": self.window,
            "correctness": self.proof._asdict() if self.proof else None,
        }

    def failed(self) -> dict[str, Any]:
        """The record of why there is no more."""
        return {"quantity": "failure", "kind": self.kind, "text": self.failure}


def recorded(records: Iterable[dict[str, Any]]) -> dict[Row, Result]:
    """The results that records tell of. A row whose GPU was lost is one still to be measured.

    Raises ValueError for a record that lacks what its quantity has, naming it.
    """
    results: dict[Row, Result] = {}
    for record in records:
        if record["quantity"] not in ("latency", "memory", "energy", "failure"):
            continue
        try:
            row = Row(record["subject"], Workload(**record["workload"]))
            _take(record, results.setdefault(row, Result(row)))
        except (KeyError, TypeError) as error:
            raise ValueError(f"a {record['quantity']} record lacks or has too much: {error}") from None
    return results


def _take(record: dict[str, Any], result: Result) -> None:
    match record["quantity"]:
        case "latency":
            result.samples = Samples(record["samples_seconds"], record["order"], record["interrupted"])
            base = record["base_samples_seconds"], record["base_order"], record["base_interrupted"]
            result.base, result.beside = Samples(*base), record["interleaved_with"]
            result.window = record["window"]
            result.proof = Proof(**record["correctness"]) if record["correctness"] else None
        case "memory":
            result.memory = record["memory"]
        case "energy":
            result.energy = record["energy"]
        case "failure" if record["kind"] != "gpu_lost":
            result.kind, result.failure = record["kind"], record["text"]
