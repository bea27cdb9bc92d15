"""What worker processes say, in the place of `isolate.stream`; and what they were asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from lora_bench.bench import measure
from lora_bench.bench import session as sessions
from lora_bench.bench.isolate import Failure
from lora_bench.bench.result import Proof
from lora_bench.bench.sampling import Samples
from lora_bench.bench.turns import Timing
from lora_bench.bench.workload import BASE, Row

ROUNDS = 7
FINGERPRINT: dict[str, Any] = {"hard": {"device_name": "A", "torch": "2"}, "soft": {}}
MEMORY = {"parameter_bytes": 7}
ENERGY = {"joules": 3.0}
WINDOW = {"clocks": "steady"}
PROOF = Proof(14, 0.5, 9.0)

Script = Callable[[list[Row]], Iterable[Any]]


def samples(seconds: float) -> Samples:
    return Samples([seconds] * ROUNDS, list(range(ROUNDS)), [False] * ROUNDS)


def timing(of: Row, seconds: float = 1.0, base_seconds: float = 0.5) -> Timing:
    base = of.subject == BASE
    proof = None if base else PROOF
    return Timing(of, samples(base_seconds if base else seconds), samples(base_seconds), proof, [str(of)], WINDOW)


def times_all(rows: list[Row]) -> Iterator[Any]:
    yield FINGERPRINT
    yield from map(timing, rows)


def weighs_all(rows: list[Row]) -> Iterator[Any]:
    yield FINGERPRINT
    for row in rows:
        yield row, MEMORY


def powers_all(rows: list[Row]) -> Iterator[Any]:
    yield FINGERPRINT
    for row in rows:
        yield row, ENERGY


def says(*messages: Any) -> Script:
    """A worker that says this and ends."""
    return lambda _rows: messages


def dies(kind: str, text: str, *before: Any, of: Row | None = None) -> Script:
    """A worker that says this, and fails with that row in hand."""
    return lambda rows: (FINGERPRINT, *before, Failure(kind, text, held=None if of is None else rows.index(of)))


class Workers:
    """The scripts of the next workers of each kind; one without a script does all that it is asked."""

    def __init__(self) -> None:
        self.comparisons: list[Script] = []
        self.weighings: list[Script] = []
        self.powerings: list[Script] = []
        self.compared: list[list[Row]] = []
        self.weighed: list[list[Row]] = []
        self.powered: list[list[Row]] = []
        self.patience: set[float] = set()

    def stream(self, function: Any, rows: list[Row], device: str, *budget: float, seconds: float) -> Iterator[Any]:
        assert device in ("cpu", "cuda")
        self.patience.add(seconds)
        asked, scripts, otherwise, wanted = {
            measure.compare: (self.compared, self.comparisons, times_all, (3.0,)),
            measure.weigh: (self.weighed, self.weighings, weighs_all, ()),
            measure.power: (self.powered, self.powerings, powers_all, (9.0,)),
        }[function]
        assert budget == wanted
        asked.append(rows)
        yield from (scripts.pop(0) if scripts else otherwise)(rows)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    made = Workers()
    monkeypatch.setattr(sessions, "stream", made.stream)
    return made
