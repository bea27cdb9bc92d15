"""Turns: which arms share the memory, and in which order and how often their rows run."""

from __future__ import annotations

import itertools
import math
import time
from typing import TYPE_CHECKING

import pytest
import torch

from lora_bench.bench import measure
from lora_bench.bench.arm import Step
from lora_bench.bench.measure import groups_that_fit, time_interleaved
from lora_bench.bench.workload import BASE, Row
from tests.micro_rows import row, with_bases

if TYPE_CHECKING:
    from collections.abc import Callable


# --- groups ---------------------------------------------------------------------------------------------------------

SUBJECTS = ("a", "b", "c")
INFERENCE = with_bases(*(row(name, "separate", phase) for name in SUBJECTS for phase in ("prefill", "decode")))
TRAINING = with_bases(*(row(name, "separate", "train") for name in SUBJECTS))


@pytest.mark.parametrize(
    ("rows", "room", "sizes"),
    [
        (INFERENCE, 10_000, [3]),
        (INFERENCE, 338, [3]),
        (INFERENCE, 337, [2, 1]),
        (INFERENCE, 225, [2, 1]),
        (INFERENCE, 224, [1, 1, 1]),
        (INFERENCE, 0, [1, 1, 1]),
        (TRAINING, 300 + 338, [3]),
        (TRAINING, 300 + 337, [2, 1]),
        (TRAINING, 300, [1, 1, 1]),
        (TRAINING, 0, [1, 1, 1]),
        (INFERENCE[:2], 0, [0]),
    ],
)
def test_groups_are_as_large_as_the_room_allows_and_each_has_the_base(
    rows: list[Row], room: int, sizes: list[int]
) -> None:
    groups = groups_that_fit(rows, weight_bytes=100, room=room)

    assert [len({row.arm for row in group} - {(BASE, BASE)}) for group in groups] == sizes
    for group in groups:
        assert [row for row in group if row.subject == BASE] == [row for row in rows if row.subject == BASE]
        assert group == [row for row in rows if row in group]
    subjects = [row for group in groups for row in group if row.subject != BASE]
    assert sorted(subjects, key=rows.index) == [row for row in rows if row.subject != BASE] == subjects


def test_free_memory_is_the_device_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", {"cuda:1": (7, 9)}.__getitem__)

    assert measure.free_bytes("cuda:1") == 7
    assert measure.free_bytes("cpu") > 2**20


# --- turns ----------------------------------------------------------------------------------------------------------


class Turns:
    """Three rows under a clock of their own: every call takes a second, and the n-th measurement reads n."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows = [row(name, "separate", "decode") for name in SUBJECTS]
        self.journal: list[str] = []
        self.now = 1000.0
        self.reading = itertools.count()
        monkeypatch.setattr(measure, "clock_of", {"cuda:1": self.clock}.__getitem__)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def clock(self, run: Callable[[], object]) -> float:
        run()
        self.now += 1
        return float(next(self.reading))

    def step(self, name: str) -> Step:
        return Step(lambda: self.journal.append(name), prepare=lambda: self.journal.append(f"prepare {name}"))

    def take(self, budget: float) -> list[list[float]]:
        steps = {row: self.step(row.subject) for row in self.rows}
        return list(time_interleaved(steps, "cuda:1", budget).values())

    def rounds(self) -> list[list[str]]:
        names = [name for name in self.journal if not name.startswith("prepare")]
        return [names[start : start + len(self.rows)] for start in range(0, len(names), len(self.rows))]


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Turns:
    return Turns(monkeypatch)


def test_every_row_runs_once_a_round_prepared_and_in_changing_order(turns: Turns) -> None:
    turns.take(0.0)

    assert all(sorted(names) == list(SUBJECTS) for names in turns.rounds())
    assert turns.journal[0::2] == [f"prepare {name}" for name in turns.journal[1::2]]
    assert len(set(map(tuple, turns.rounds()))) > 3


def test_the_order_is_the_same_in_every_run(turns: Turns) -> None:
    turns.take(0.0)
    first = list(turns.journal)
    turns.journal.clear()
    turns.take(0.0)

    assert turns.journal == first


def test_samples_are_in_order_and_the_warm_up_is_not_among_them(turns: Turns) -> None:
    samples = turns.take(0.0)

    assert sorted(itertools.chain(*samples)) == list(
        range(3 * measure.WARM_UP_ROUNDS, 3 * (measure.WARM_UP_ROUNDS + 10))
    )
    assert all(values == sorted(values) for values in samples)
    for number, names in enumerate(turns.rounds()[measure.WARM_UP_ROUNDS :]):
        of_round = sorted(values[number] for values in samples)
        assert [samples[SUBJECTS.index(name)][number] for name in names] == of_round


@pytest.mark.parametrize(
    ("budget", "rounds"),
    [
        (0.0, measure.LEAST_ROUNDS),
        (36.0, measure.LEAST_ROUNDS + 1),  # a round takes 3 s, and the warm-up counts: 36 s are over after 13 rounds
        (60.0, 19),
        (math.inf, measure.MOST_ROUNDS),
    ],
)
def test_rounds_go_on_until_the_time_is_over(turns: Turns, budget: float, rounds: int) -> None:
    assert [len(values) for values in turns.take(budget)] == [rounds] * 3


@pytest.mark.parametrize(("device", "moved"), [("cpu", 6), ("cuda", 0)])
def test_on_a_cpu_every_row_changes_its_place_every_other_round(
    monkeypatch: pytest.MonkeyPatch, device: str, moved: int
) -> None:
    journal: list[str] = []
    monkeypatch.setattr(measure, "clock_of", lambda _device: lambda run: run() or 1.0)
    steps = {
        row(name, "separate", "decode"): Step(
            lambda name=name: journal.append(f"run {name}"),  # type: ignore[misc]  # each its own name
            relocate=lambda name=name: journal.append(f"move {name}"),  # type: ignore[misc]
        )
        for name in SUBJECTS
    }
    time_interleaved(steps, device, 0.0)

    assert [journal.count(f"move {name}") for name in SUBJECTS] == [moved] * len(SUBJECTS)
    if moved:
        every = 3 * len(SUBJECTS)
        assert {word.split()[0] for word in journal[::every]} == {"move"}
        assert {word.split()[0] for word in journal[len(SUBJECTS) :: every]} == {"run"}


@pytest.mark.parametrize(
    ("device", "omp", "wanted"), [("cpu", None, [1]), ("cpu", "4", []), ("cuda", None, []), ("cuda:1", None, [])]
)
def test_a_cpu_measures_with_one_thread_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, device: str, omp: str | None, wanted: list[int]
) -> None:
    found: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    measure.settle_threads(device)

    assert found == wanted
