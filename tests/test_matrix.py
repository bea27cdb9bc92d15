"""Which ranks and adapters a run measures."""

from __future__ import annotations

from collections import Counter

import pytest

from lora_bench.bench.matrix import MATRICES, Matrix, rows
from lora_bench.bench.workload import BASE, POPULARITIES, Row

PLACE = {"model": "micro", "dtype": "fp32", "batch": 2, "sequence": 8}
SMALL = Matrix(ranks=(4, 8), adapters=(1, 2), popularities=("distinct", "zipf"))


def names(matrix: Matrix, setup: str, *phases: str) -> list[str]:
    return [str(workload) for phase in phases for workload in matrix.workloads(setup, phase, **PLACE)]


def test_the_base_has_no_rank_and_is_there_once() -> None:
    assert names(SMALL, BASE, "prefill") == ["prefill-micro-fp32-b2-s8"]


@pytest.mark.parametrize("setup", ["separate", "merged", "four_bit"])
def test_a_set_up_of_one_adapter_has_every_rank(setup: str) -> None:
    assert names(SMALL, setup, "decode") == ["decode-micro-fp32-r4-b2-s8", "decode-micro-fp32-r8-b2-s8"]


def test_a_mixed_batch_has_every_rank_with_every_number_asked_for_in_every_way() -> None:
    assert names(SMALL, "batched", "decode") == [
        f"decode-micro-fp32-r{rank}-b2-s8-{adapters}"
        for rank in (4, 8)
        for adapters in ("n1", "n2", "n2-zipf")  # one adapter can be asked for in one way only
    ]


def test_one_adapter_is_measured_however_it_was_to_be_asked_for() -> None:
    alone = SMALL._replace(ranks=(4,), adapters=(1,), popularities=("zipf", "uniform"))

    assert names(alone, "batched", "decode") == ["decode-micro-fp32-r4-b2-s8-n1"]


def test_rows_are_by_phase_then_workload_then_subject() -> None:
    found = rows(SMALL, "separate", ("prefill", "decode"), ("one", "two"), **PLACE)

    assert [(row.workload.phase, row.workload.rank, row.subject) for row in found] == [
        (phase, rank, subject) for phase in ("prefill", "decode") for rank in (4, 8) for subject in ("one", "two")
    ]
    assert [row.subject for row in rows(SMALL, BASE, ("decode",), ("one", "two"), **PLACE)] == [BASE]


@pytest.mark.parametrize(
    ("name", "text", "batched"),
    [
        ("quick", "rank=16 adapters=8", 1),
        ("standard", "rank=8,64 adapters=1,8,32", 2 * 3),
        (
            "full",
            "rank=4,8,16,32,64,128 adapters=1,2,4,8,16,32,64 popularity=distinct,identical,uniform,zipf",
            6 * (1 + 6 * 4),
        ),
    ],
)
def test_matrices_have_names(name: str, text: str, batched: int) -> None:
    matrix = MATRICES[name]
    found = rows(matrix, "batched", ("decode",), ("one",), **PLACE)

    assert str(matrix) == text
    assert len(found) == len(set(found)) == batched
    assert set(matrix.popularities) <= set(POPULARITIES)


def test_every_row_of_a_matrix_has_a_name_and_an_arm_of_its_own() -> None:
    every = [
        row
        for setup in ("merged", "separate", "batched", "four_bit")
        for row in rows(MATRICES["full"], setup, ("decode",), ("one", "two"), **PLACE)
    ]

    assert set(Counter(map(str, every)).values()) == {1}
    assert len({row.arm for row in every}) == len(every)
    assert {row.base() for row in every} == {Row(BASE, next(SMALL.workloads(BASE, "decode", **PLACE)))}


def test_of_pools_the_smallest_alone_is_switched() -> None:
    matrix = Matrix(ranks=(4,), adapters=(8, 2), popularities=("distinct", "zipf"))
    switched = list(matrix.workloads("batched", "switch", **PLACE))

    assert [(workload.adapters, workload.popularity) for workload in switched] == [(2, "distinct")]
