"""Groups: which arms share the memory; and with how many threads a CPU measures."""

from __future__ import annotations

import pytest
import torch

from lora_bench.bench import measure
from lora_bench.bench.measure import arms_that_fit, groups_of
from lora_bench.bench.workload import BASE, Row
from tests.micro_rows import row, with_bases

SUBJECTS = ("a", "b", "c")
INFERENCE = with_bases(*(row(name, "separate", phase) for name in SUBJECTS for phase in ("prefill", "decode")))
TRAINING = with_bases(*(row(name, "separate", "train") for name in SUBJECTS))
RANKED = with_bases(*(row("a", "batched", "decode", rank=rank, adapters=n) for rank in (4, 8) for n in (1, 8)))


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
        (RANKED, 450, [4]),
        (RANKED, 449, [3, 1]),
        (INFERENCE[:2], 0, [0]),
    ],
)
def test_groups_are_as_large_as_the_room_allows_and_each_has_the_base(
    rows: list[Row], room: int, sizes: list[int]
) -> None:
    groups = groups_of(rows, max(1, arms_that_fit(rows, weight_bytes=100, room=room)))

    assert [len({row.arm for row in group if row.subject != BASE}) for group in groups] == sizes
    for group in groups:
        assert [row for row in group if row.subject == BASE] == [row for row in rows if row.subject == BASE]
        assert group == [row for row in rows if row in group]
    subjects = [row for group in groups for row in group if row.subject != BASE]
    assert sorted(subjects, key=rows.index) == [row for row in rows if row.subject != BASE] == subjects


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
