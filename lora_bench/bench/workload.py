"""`Workload`: what is measured, as data; and the rows that a run plans."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

SETUPS = ("base", "merged", "separate", "batched", "four_bit")
PHASES = ("prefill", "decode", "train")
BASE = "base"
"""The subject's place in a row that has none: the unadapted model, the control of every comparison."""


@dataclass(frozen=True)
class Workload:
    """One set-up of one model in one phase.

    prefill reads `batch` sequences of `sequence` tokens at once; decode reads one more token of each, with a KV cache
    of `sequence` tokens; train is forward, backward and an AdamW step on `batch` x `sequence` tokens. `adapters` is how
    many share the batch (set-up "batched"; row i of a batch uses adapter i mod adapters). For the base, `rank` is 0.

    Raises ValueError for a value out of range, naming it.
    """

    setup: str
    phase: str
    model: str
    dtype: str
    rank: int
    batch: int
    sequence: int
    adapters: int = 1

    def __post_init__(self) -> None:
        for name, known in (("setup", SETUPS), ("phase", PHASES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name, least in (("rank", int(self.setup != BASE)), ("batch", 1), ("sequence", 2), ("adapters", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def __str__(self) -> str:
        """Short and stable: it becomes part of a benchmark's name and of its history."""
        name = self.model.rstrip("/").rpartition("/")[2]
        rank = [] if self.setup == BASE else [f"r{self.rank}"]
        adapters = [f"n{self.adapters}"] if self.setup == "batched" else []
        return "-".join([self.phase, name, self.dtype, *rank, f"b{self.batch}", f"s{self.sequence}", *adapters])

    @property
    def tokens(self) -> int:
        """How many tokens one step reads."""
        return self.batch * (1 if self.phase == "decode" else self.sequence)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Row(NamedTuple):
    """One line of the result: a subject (or "base") under a workload."""

    subject: str
    workload: Workload

    def __str__(self) -> str:
        return f"{self.workload.setup}[{self.subject}-{self.workload}]"

    @property
    def arm(self) -> tuple[str, str]:
        """The subject and set-up: rows of one arm share a model."""
        return self.subject, self.workload.setup

    @property
    def comparison(self) -> tuple[Any, ...]:
        """What rows must share to be measured side by side, interleaved with one base."""
        workload = self.workload
        return workload.phase == "train", workload.model, workload.dtype, workload.batch, workload.sequence

    def base(self) -> Row:
        """The control of this row."""
        fields = self.workload.as_dict() | {"setup": BASE, "rank": 0, "adapters": 1}
        return Row(BASE, Workload(**fields))


VERBS = {
    "merged": (("merge_and_unload",), ("merge",)),
    "separate": ((),),
    "batched": (("pool", "route"),),
    "four_bit": ((),),
}
"""Which verbs a set-up needs: any one of the alternatives."""
