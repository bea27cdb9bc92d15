"""Groups: which arms share the memory; and with how many threads a CPU measures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_bench.bench import groups, measure
from lora_bench.bench.counts import Ceilings
from lora_bench.bench.groups import arm_bytes, grouped
from lora_bench.bench.turns import Progress
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
        (INFERENCE[:2], 0, [], 0),
    ],
)
def test_groups_are_as_large_as_the_room_allows_and_each_has_the_base(
    monkeypatch: pytest.MonkeyPatch, rows: list[Row], room: int, sizes: list[int], too_large: int
) -> None:
    monkeypatch.setattr(groups, "arm_bytes", lambda *_: 112)
    found, apart = grouped(rows, weight_bytes=100, room=room)

    assert [len({row.arm for row in group if row.subject != BASE}) for group in found] == sizes
    assert len({row.arm for row in apart}) == too_large
    for group in found:
        assert [row for row in group if row.subject == BASE] == [row for row in rows if row.subject == BASE]
        assert group == [row for row in rows if row in group]
    subjects = [row for group in [*found, apart] for row in group if row.subject != BASE]
    assert sorted(subjects, key=rows.index) == [row for row in rows if row.subject != BASE] == subjects


def test_an_arm_that_is_too_large_keeps_no_other_from_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "arm_bytes", lambda of, _: {"a": 100, "b": 900, "c": 100}[of.subject])
    ((group,), apart) = grouped(INFERENCE, weight_bytes=100, room=300)

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


@pytest.mark.parametrize(("device", "apart"), [("cuda", True), ("cpu", False)])
def test_what_has_no_room_is_timed_apart_on_a_gpu_and_tried_by_itself_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, device: str, apart: bool
) -> None:
    def told(name: str) -> Any:
        return lambda rows, *_: iter([Progress(" ".join([name, *(each.arm_name for each in rows)]))])

    for name, value in {
        "settle_threads": lambda _: None,
        "fingerprint": lambda _: {},
        "measure_ceilings": lambda *_: Ceilings(1.0, 1.0),
        "release": lambda _: None,
        "build_base": lambda *_: SimpleNamespace(to=lambda _: None),
        "parameter_bytes": lambda _: 100,
        "free_bytes": lambda _: 300,
        "bracketed": told("apart"),
        "take_turns": told("together"),
    }.items():
        monkeypatch.setattr(measure, name, value)
    monkeypatch.setattr(groups, "arm_bytes", lambda of, _: {"a": 100, "b": 900, "c": 100}[of.subject])
    rows = with_bases(*(row(name, "separate", "decode") for name in SUBJECTS))
    texts = [each.text for each in measure.compare(rows, device, 0.0) if isinstance(each, Progress)]

    assert texts[0] == "together base a separate r4 c separate r4"
    assert texts[-1] == f"{'apart' if apart else 'together'} base b separate r4"


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
