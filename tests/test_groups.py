"""Groups: which arms share the memory; and with how many threads a CPU measures."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_bench.bench import groups, measure
from lora_bench.bench.counts import Ceilings
from lora_bench.bench.groups import arm_bytes, grouped
from lora_bench.bench.turns import Progress, Refusal
from lora_bench.bench.workload import BASE, Row
from tests.micro_rows import row, with_bases

SUBJECTS = ("a", "b", "c")
INFERENCE = with_bases(*(row(name, "separate", phase) for name in SUBJECTS for phase in ("prefill", "decode")))
TRAINING = with_bases(*(row(name, "separate", "train") for name in SUBJECTS))
RANKED = with_bases(*(row("a", "batched", "decode", rank=rank, adapters=n) for rank in (4, 8) for n in (1, 8)))


@pytest.mark.parametrize(
    ("rows", "room", "sizes", "too_large"),
    [
        (INFERENCE, 10_000, [3], 0),
        (INFERENCE, 336, [3], 0),
        (INFERENCE, 335, [2, 1], 0),
        (INFERENCE, 224, [2, 1], 0),
        (INFERENCE, 223, [1, 1, 1], 0),
        (INFERENCE, 112, [1, 1, 1], 0),
        (INFERENCE, 111, [], 3),
        (TRAINING, 300 + 336, [3], 0),
        (TRAINING, 300 + 335, [2, 1], 0),
        (TRAINING, 300 + 112, [1, 1, 1], 0),
        (TRAINING, 300, [], 3),
        (TRAINING, 0, [], 3),
        (RANKED, 448, [4], 0),
        (RANKED, 447, [3, 1], 0),
        (INFERENCE[:2], 0, [0], 0),
    ],
)
def test_groups_are_as_large_as_the_room_allows_and_each_has_the_base(
    monkeypatch: pytest.MonkeyPatch, rows: list[Row], room: int, sizes: list[int], too_large: int
) -> None:
    monkeypatch.setattr(groups, "arm_bytes", lambda *_: 112)
    found, apart = grouped(rows, weight_bytes=100, room=room, apart=True)

    assert [len({row.arm for row in group if row.subject != BASE}) for group in found] == sizes
    assert len({row.arm for row in apart}) == too_large
    for group in found:
        assert [row for row in group if row.subject == BASE] == [row for row in rows if row.subject == BASE]
        assert group == [row for row in rows if row in group]
    subjects = [row for group in [*found, apart] for row in group if row.subject != BASE]
    assert sorted(subjects, key=rows.index) == [row for row in rows if row.subject != BASE] == subjects


def test_an_arm_that_is_too_large_keeps_no_other_from_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "arm_bytes", lambda of, _: {"a": 100, "b": 900, "c": 100}[of.subject])
    ((group,), apart) = grouped(INFERENCE, weight_bytes=100, room=300, apart=True)

    assert {row.subject for row in group} == {BASE, "a", "c"}
    assert {row.subject for row in apart} == {"b"}


def test_a_pool_of_many_adapters_takes_its_room() -> None:
    one = row("a", "separate", "decode", model="llama-2-7b", dtype="bf16", rank=64)
    many = row("a", "batched", "decode", model="llama-2-7b", dtype="bf16", rank=64, adapters=32)
    switch = row("a", "separate", "switch", model="llama-2-7b", dtype="bf16", rank=64)
    weights = 13_476_839_424
    own = 2 * 159_907_840  # bytes of one adapter: r (d_in + d_out) of all linear layers, in two bytes each

    assert arm_bytes(one, weights) == weights * 9 // 8 + 2 * own
    assert arm_bytes(switch, weights) == weights * 9 // 8 + 3 * own
    assert arm_bytes(many, weights) == weights * 9 // 8 + 2 * 34 * own
    assert arm_bytes(row("a", "separate", "decode", model="no/such/folder"), 800) == 900


def test_if_none_is_set_apart_one_that_is_too_large_has_a_group_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "arm_bytes", lambda of, _: {"a": 100, "b": 900, "c": 100}[of.subject])
    found, none = grouped(INFERENCE, weight_bytes=100, room=300, apart=False)

    assert [{row.subject for row in group} for group in found] == [{BASE, "a"}, {BASE, "b"}, {BASE, "c"}]
    assert none == []


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Puts so much room on a device and its host, for a base of 100 bytes; arms say what is done with them."""

    def told(name: str) -> Any:
        return lambda rows, *_: iter([Progress(" ".join([name, *(each.arm_name for each in rows)]))])

    def stub(room: int, host: int) -> None:
        for name, value in {
            "settle_threads": lambda _: None,
            "fingerprint": lambda _: {},
            "measure_ceilings": lambda *_: Ceilings(1.0, 1.0),
            "release": lambda _: None,
            "build_base": lambda *_: SimpleNamespace(to=lambda _: None),
            "parameter_bytes": lambda _: 100,
            "free_bytes": lambda where: host if where == "cpu" else room,
            "bracketed": told("apart"),
            "take_turns": told("together"),
        }.items():
            monkeypatch.setattr(measure, name, value)
        monkeypatch.setattr(groups, "arm_bytes", lambda of, _: {"a": 100, "b": 900, "c": 100}[of.subject])

    return stub


EACH = with_bases(*(row(name, "separate", "decode") for name in SUBJECTS))


@pytest.mark.parametrize(
    ("device", "room", "wanted"),
    [
        ("cuda", 2000, ["together base a separate r4 b separate r4 c separate r4"]),
        ("cuda:1", 300, ["together base a separate r4 c separate r4", "apart base b separate r4"]),
        ("cuda", 0, ["apart base a separate r4 b separate r4 c separate r4"]),
        ("cpu", 300, [f"together base {name} separate r4" for name in SUBJECTS]),
    ],
)
def test_what_has_no_room_is_timed_apart_on_a_gpu_and_tried_by_itself_on_a_cpu(
    stubs: Callable[[int, int], None], device: str, room: int, wanted: list[str]
) -> None:
    stubs(room, room if device == "cpu" else 100)
    texts = [each.text for each in measure.compare(EACH, device, 0.0) if isinstance(each, Progress)]

    assert [text for text in texts if text.startswith(("together", "apart"))] == wanted
    alone = [each.text for each in measure.compare(EACH[:1], device, 0.0) if isinstance(each, Progress)]
    assert alone == ["together base"]


def test_rows_whose_weights_the_host_cannot_hold_are_refused_and_the_others_measured(
    stubs: Callable[[int, int], None],
) -> None:
    stubs(300, 99)
    messages = list(measure.compare(EACH, "cuda", 0.0))

    (refusal,) = [each for each in messages if isinstance(each, Refusal)]
    assert (refusal.row.subject, refusal.kind) == ("b", "oom")
    assert "its 100 bytes do not fit the host's memory: 99 are free" in refusal.text
    assert Progress("together base a separate r4 c separate r4") in messages


def test_free_memory_is_the_device_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", {"cuda:1": (7, 9)}.__getitem__)

    assert measure.free_bytes("cuda:1") == 7
    assert measure.free_bytes("cpu") > 2**20


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
