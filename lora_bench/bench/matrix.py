"""`Matrix`: which ranks and adapters a run measures; a few have names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from lora_bench.bench.workload import BASE, Row, Workload

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Matrix(NamedTuple):
    """The ranks of every set-up with an adapter; how many adapters a mixed batch chooses from, and how it chooses."""

    ranks: tuple[int, ...]
    adapters: tuple[int, ...]
    popularities: tuple[str, ...] = ("distinct",)

    def __str__(self) -> str:
        parts: dict[str, tuple[object, ...]] = {"rank": self.ranks, "adapters": self.adapters}
        if self.popularities != ("distinct",):
            parts["popularity"] = self.popularities
        return " ".join(f"{name}={','.join(map(str, values))}" for name, values in parts.items())

    def workloads(self, setup: str, phase: str, **place: Any) -> Iterator[Workload]:
        """The workloads of one set-up in one phase; `place` is the model, dtype, batch, sequence, targets."""
        if setup == BASE:
            yield Workload(setup, phase, rank=0, **place | {"targets": "all"})  # it has none
            return
        # Of one adapter all ways to ask are the same.
        batched = [
            (number, how) for number in self.adapters for how in (self.popularities if number > 1 else ("distinct",))
        ]
        if phase == "switch":  # a pool takes as many times longer as it holds more
            batched = [(min(self.adapters), "distinct")]
        for rank in self.ranks:
            for adapters, popularity in batched if setup == "batched" else [(1, "distinct")]:
                yield Workload(setup, phase, rank=rank, adapters=adapters, popularity=popularity, **place)


MATRICES = {
    "quick": Matrix(ranks=(16,), adapters=(8,)),
    "standard": Matrix(ranks=(8, 64), adapters=(1, 8, 32)),
    "full": Matrix(
        ranks=(4, 8, 16, 32, 64, 128),
        adapters=(1, 2, 4, 8, 16, 32, 64),
        popularities=("distinct", "identical", "uniform", "zipf"),
    ),
}


def rows(matrix: Matrix, setup: str, phases: Sequence[str], subjects: Sequence[str], **place: Any) -> list[Row]:
    """The rows of one set-up: each workload for each subject; the base has none."""
    return [
        Row(subject, workload)
        for phase in phases
        for workload in matrix.workloads(setup, phase, **place)
        for subject in ((BASE,) if setup == BASE else subjects)
    ]
