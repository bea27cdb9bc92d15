"""The two jobs of a worker: rows that take turns, and peak memory; what fails costs its own rows alone."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lora_bench.bench import measure
from lora_bench.bench.arm import Arm, Step, build_arm
from lora_bench.bench.measure import Progress, Refusal, Timing, groups_that_fit, time_interleaved
from lora_bench.bench.proof import Wrong
from lora_bench.bench.workload import BASE, Row, Workload

if TYPE_CHECKING:
    from collections.abc import Callable

PLANTED = """
from dataclasses import replace

from lora_bench import REFERENCE
from lora_bench.reference import LoraLinear


def raises(base, spec):
    raise RuntimeError("no kernel for this machine")


class Dropped(LoraLinear):
    def forward(self, x):
        return self.base_layer(x)


class Greedy(LoraLinear):
    def forward(self, x):
        if self.training and len(x) > 1:
            raise MemoryError("a batch is too much")
        return super().forward(x)


RAISES = replace(REFERENCE, name="raises", wrap=raises)
DROPPED = replace(REFERENCE, name="dropped", wrap=Dropped)
GREEDY = replace(REFERENCE, name="greedy", wrap=Greedy)
"""


@pytest.fixture
def planted(tmp_path: Path) -> Callable[[str], str]:
    """The text of a planted subject by its name."""
    (tmp_path / "planted.py").write_text(PLANTED)
    return lambda name: f"{tmp_path}/planted.py:{name}"


def row(subject: str, setup: str, phase: str, **changes: Any) -> Row:
    fields: dict[str, Any] = {"model": "micro", "dtype": "fp32", "rank": 4, "batch": 2, "sequence": 6}
    return Row(subject, Workload(setup, phase, **fields | changes))


def with_bases(*rows: Row) -> list[Row]:
    return list(dict.fromkeys([*(row.base() for row in rows), *rows]))


def compared(*rows: Row) -> list[Any]:
    return list(measure.compare(with_bases(*rows), "cpu", 0.0))


def of_type(kind: type, messages: list[Any]) -> list[Any]:
    return [message for message in messages if isinstance(message, kind)]


# --- compare --------------------------------------------------------------------------------------------------------


def test_rows_are_proven_and_then_timed_round_by_round_beside_their_base() -> None:
    rows = [
        row("reference", "separate", "prefill"),
        row("reference", "separate", "decode"),
        row("reference", "merged", "decode"),
    ]
    fingerprint, *messages = compared(*rows)
    timings = {timing.row: timing for timing in of_type(Timing, messages)}

    assert fingerprint["hard"]["device"] == "cpu"
    assert not of_type(Refusal, messages)
    assert timings.keys() == set(with_bases(*rows))
    for timing in timings.values():
        base = timings[timing.row.base()]
        assert len(timing.seconds) == measure.LEAST_ROUNDS
        assert timing.base_seconds == base.seconds
        assert all(0 < seconds < 60 for seconds in timing.seconds)
        assert (timing.proof is None) == (timing.row.subject == BASE)
    assert set(timings[rows[0]].beside) == {str(rows[0]), str(rows[0].base())}
    assert set(timings[rows[1]].beside) == {str(rows[1]), str(rows[2]), str(rows[1].base())}


def test_whoever_waits_is_told_what_was_proven_and_what_is_timed() -> None:
    texts = [text for (text,) in of_type(Progress, compared(row("reference", "batched", "decode", adapters=2)))]

    assert texts[0].startswith("reference batched is right: 28 checks, errors up to 0.")
    assert texts[1:] == ["timing decode: 2 rows taking turns, about 0 s"]


def test_a_subject_that_raises_or_is_wrong_is_refused_by_kind_and_the_others_are_timed(
    planted: Callable[[str], str],
) -> None:
    bad = [row(planted(name), "separate", "decode") for name in ("RAISES", "DROPPED")]
    good = row("reference", "separate", "decode")
    messages = compared(*bad, good, row(planted("DROPPED"), "merged", "decode"))
    raised, wrong = of_type(Refusal, messages)

    assert (raised.row, raised.kind, raised.text) == (bad[0], "error", "RuntimeError: no kernel for this machine")
    assert (wrong.row, wrong.kind) == (bad[1], "wrong")
    assert wrong.text.startswith("Wrong: model.layers.0.self_attn.q_proj: found ")
    timed = {timing.row for timing in of_type(Timing, messages)}
    assert timed == {good, good.base(), row(planted("DROPPED"), "merged", "decode")}


def test_an_arm_that_fails_in_one_phase_is_refused_in_all(planted: Callable[[str], str]) -> None:
    rows = [row(planted("RAISES"), "separate", phase) for phase in ("prefill", "decode")]

    assert [refusal.row for refusal in of_type(Refusal, compared(*rows))] == rows


def test_a_step_that_fails_only_at_its_full_size_costs_its_own_row(planted: Callable[[str], str]) -> None:
    greedy, good = row(planted("GREEDY"), "separate", "train"), row("reference", "separate", "train")
    messages = compared(greedy, good)

    (refusal,) = of_type(Refusal, messages)
    assert refusal == Refusal(greedy, "oom", "MemoryError: a batch is too much")
    assert {timing.row for timing in of_type(Timing, messages)} == {good, good.base()}


def test_without_its_base_a_row_is_timed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(model: Any, subject: Any, *arguments: Any, **keywords: Any) -> Any:
        if subject is None:
            raise torch.OutOfMemoryError("full fine-tuning is too much")
        return build_arm(model, subject, *arguments, **keywords)

    monkeypatch.setattr(measure, "build_arm", build)
    good = row("reference", "separate", "train")
    messages = compared(good)

    assert of_type(Refusal, messages) == [Refusal(good.base(), "oom", "OutOfMemoryError: full fine-tuning is too much")]
    (timing,) = of_type(Timing, messages)
    assert (timing.row, timing.base_seconds) == (good, [])


@pytest.mark.parametrize(("phase", "builds"), [("train", 2), ("decode", 1)])
def test_arms_that_do_not_fit_together_take_turns_with_a_base_of_their_own(
    monkeypatch: pytest.MonkeyPatch, phase: str, builds: int
) -> None:
    built = []

    def build_base(*arguments: Any) -> Any:
        built.append(1)
        return original(*arguments)

    original = measure.build_base
    monkeypatch.setattr(measure, "build_base", build_base)
    monkeypatch.setattr(measure, "free_bytes", lambda _: 0)
    rows = [row(subject, "separate", phase) for subject in ("reference", "peft")]
    messages = compared(*rows)

    assert not of_type(Refusal, messages)
    timings = of_type(Timing, messages)
    for timing in timings:
        assert len(timing.beside) == 2
        assert len(timing.base_seconds) == len(timing.seconds)
    assert sorted(timing.row.subject for timing in timings) == [BASE, BASE, "peft", "reference"]
    # A base that was trained is no control any more; one that was not is kept.
    assert len(built) == builds


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "oom"),
        (torch.OutOfMemoryError("CUDA out of memory"), "oom"),
        (Wrong("q_proj"), "wrong"),
        (AssertionError(), "error"),
        (RuntimeError("no kernel"), "error"),
    ],
)
def test_failures_are_told_apart(error: BaseException, kind: str) -> None:
    assert measure.failure_kind(error) == kind


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


# --- weigh ----------------------------------------------------------------------------------------------------------

ADAPTER_BYTES = (
    4 * 2 * sum(4 * (d_in + d_out) for d_in, d_out in [(64, 64)] * 2 + [(64, 32)] * 2 + [(64, 128)] * 2 + [(128, 64)])
)


def weighed(*rows: Row) -> list[dict[str, Any]]:
    found = dict(measure.weigh(rows, "cpu"))
    assert list(found) == list(rows)
    return list(found.values())


def test_memory_is_told_for_every_phase_of_an_arm() -> None:
    for peaks in weighed(row("reference", "separate", "prefill"), row("reference", "separate", "decode")):
        assert peaks.keys() == {
            "parameter_bytes",
            "allocated_peak_bytes",
            "reserved_peak_bytes",
            "nvml_process_bytes",
            "resident_peak_bytes",
            "saved_tensor_bytes",
            "attribution",
        }
        assert all(isinstance(value, (int, str)) for value in peaks.values())


def test_an_adapter_weighs_its_factors_and_a_merged_one_nothing() -> None:
    rows = [row("reference", setup, "decode") for setup in ("separate", "merged", "four_bit")]
    base, separate, merged, four_bit = (weighed(row)[0]["parameter_bytes"] for row in [rows[0].base(), *rows])

    assert separate == base + ADAPTER_BYTES
    assert merged == base
    assert four_bit < 0.6 * base


@pytest.mark.parametrize("setup", ["separate", "merged", "batched", "four_bit"])
def test_what_an_arm_is_judged_by_is_not_weighed_with_it(monkeypatch: pytest.MonkeyPatch, setup: str) -> None:
    def weigh(arm: Arm, *_: object, **__: object) -> dict[str, Any]:
        return {"adapters": arm.adapters, "controls": arm.controls}

    monkeypatch.setattr(measure, "peak_memory", weigh)

    assert weighed(row("reference", setup, "decode")) == [{"adapters": {}, "controls": {}}]


def test_training_an_adapter_saves_less_for_backward_than_full_fine_tuning() -> None:
    of = row("reference", "separate", "train", sequence=32)
    (full,), (adapter,) = weighed(of.base()), weighed(of)

    assert adapter["saved_tensor_bytes"] > 0
    assert full["saved_tensor_bytes"] > 0
    assert full["parameter_bytes"] < adapter["parameter_bytes"]
