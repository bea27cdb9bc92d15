"""`Workload`: what is measured, as data; and the rows that a run plans."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from lora_bench.models.presets import SINGLE, widths

SETUPS = ("base", "merged", "separate", "batched", "four_bit")
PHASES = ("prefill", "decode", "switch", "train")
POPULARITIES = ("distinct", "identical", "uniform", "zipf")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGET_SETS = {"all": TARGETS, "attention": TARGETS[:4], "qv": ("q_proj", "v_proj")}
"""Which linear layers of a decoder layer are adapted, by the name of the choice; "qv" is that of Hu et al. 2021."""
BASE = "base"
"""The subject's place in a row that has none: the unadapted model, the control of every comparison."""


@dataclass(frozen=True)
class Workload:
    """One set-up of one model in one phase.

    prefill reads `batch` sequences of `sequence` tokens at once; decode reads one more token of each, with a KV cache
    of `sequence` tokens; train is forward, backward and an AdamW step on `batch` x `sequence` tokens; switch reads
    nothing, and puts another adapter in the place of the one that is served (for "batched", a pool of them).

    `adapters` is how many the batch may ask for (set-up "batched"), `popularity` how: row i for adapter i mod adapters
    ("distinct"), all for one ("identical"), or at random, each alike ("uniform") or the k-th 1 / k as often as the
    first ("zipf"). `targets` is one of `TARGET_SETS`; with "four_bit" the others stay dense. For the base, `rank` is 0.

    Of a single layer ("linear-4096x11008") prefill and train read batch x sequence rows, and decode `batch` of them.

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
    popularity: str = "distinct"
    targets: str = "all"

    def __post_init__(self) -> None:
        words = {"setup": SETUPS, "phase": PHASES, "popularity": POPULARITIES, "targets": tuple(TARGET_SETS)}
        for name, known in words.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name, least in (("rank", int(self.setup != BASE)), ("batch", 1), ("sequence", 2), ("adapters", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.targets != "all" and widths(self.model):
            raise ValueError(f"targets must be all for {self.model}, which is one layer, got {self.targets!r}")

    def __str__(self) -> str:
        """Short and stable: it becomes part of a benchmark's name and of its history."""
        name = self.model.rstrip("/").rpartition("/")[2]
        rank = [] if self.setup == BASE else [f"r{self.rank}"]
        adapters = [f"n{self.adapters}"] if self.setup == "batched" else []
        adapters += [self.popularity] if self.popularity != "distinct" else []
        adapters += [self.targets] if self.targets != "all" else []
        return "-".join([self.phase, name, self.dtype, *rank, f"b{self.batch}", f"s{self.sequence}", *adapters])

    @property
    def tokens(self) -> int:
        """How many tokens one step reads."""
        if self.phase == "switch":
            return 0
        return self.batch * (1 if self.phase == "decode" else self.sequence)

    @property
    def adapted(self) -> tuple[str, ...]:
        """The layers that get an adapter, by the ends of their names."""
        return (SINGLE,) if widths(self.model) else TARGET_SETS[self.targets]

    @property
    def asked(self) -> list[int]:
        """Which adapter each sequence of the batch asks for; the same for the same workload."""
        draw, every = random.Random(self.batch), range(self.adapters)
        match self.popularity:
            case "identical":
                return [0] * self.batch
            case "uniform":
                return draw.choices(every, k=self.batch)
            case "zipf":
                return draw.choices(every, weights=[1 / (k + 1) for k in every], k=self.batch)
            case _:
                return [row % self.adapters for row in range(self.batch)]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Row(NamedTuple):
    """One line of the result: a subject (or "base") under a workload."""

    subject: str
    workload: Workload

    def __str__(self) -> str:
        return f"{self.workload.setup}[{self.subject}-{self.workload}]"

    @property
    def _switches(self) -> bool:
        return self.workload.phase == "switch"

    @property
    def arm(self) -> tuple[Any, ...]:
        """What rows must share to be measured on the same model: the subject, the set-up, its adapters, their stay."""
        workload = self.workload
        adapters = workload.rank, workload.adapters, workload.popularity, workload.targets
        return self.subject, workload.setup, *adapters, self._switches

    @property
    def arm_name(self) -> str:
        """The arm, for a line of progress."""
        workload = self.workload
        parts = [self.subject, workload.setup] if self.subject != BASE else [BASE]
        parts += [f"r{workload.rank}"] if workload.rank else []
        parts += [f"n{workload.adapters}"] if workload.setup == "batched" else []
        parts += [workload.popularity] if workload.popularity != "distinct" else []
        return " ".join(parts + (["to switch"] if self._switches else []))

    @property
    def comparison(self) -> tuple[Any, ...]:
        """What rows must share to be measured side by side, interleaved with one base."""
        workload = self.workload
        return workload.phase == "train", workload.model, workload.dtype, workload.batch, workload.sequence

    def base(self) -> Row:
        """The control of this row: of a switch, a token read by the base."""
        none = {"setup": BASE, "rank": 0, "adapters": 1, "popularity": "distinct", "targets": "all"}
        phase = "decode" if self._switches else self.workload.phase
        return Row(BASE, Workload(**self.workload.as_dict() | none | {"phase": phase}))


VERBS = {
    "merged": (("merge_and_unload",), ("merge",)),
    "separate": ((),),
    "batched": (("pool", "route"),),
    "four_bit": ((),),
}


def verbs(workload: Workload) -> tuple[tuple[str, ...], ...]:
    """Which verbs a workload needs: any one of the alternatives."""
    switches_in_place = workload.setup == "merged" and workload.phase == "switch"
    return (("merge", "unmerge"),) if switches_in_place else VERBS[workload.setup]
