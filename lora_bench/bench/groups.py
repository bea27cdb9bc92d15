"""Which arms share the device's memory with the base, and with each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_bench.bench.budget import budget
from lora_bench.bench.workload import BASE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_bench.bench.workload import Row


def arm_bytes(row: Row, weight_bytes: int) -> int:
    """What the row's arm takes: a model, an eighth of it for activations and cache, its adapters, as drawn and loaded.

    To switch there is a second set of them. Of a model whose shapes are not known the adapters are not counted.
    """
    of = row.workload
    place = {"model": of.model, "batch": of.batch, "sequence": of.sequence, "dtype": of.dtype}
    try:
        adapters = budget(
            **place,
            mode="lora",
            phase="prefill",
            rank=of.rank,
            adapters=of.adapters,
            targets=() if of.targets == "all" else of.adapted,
        ).adapters
    except ValueError:
        adapters = 0
    return weight_bytes + weight_bytes // 8 + (3 if of.phase == "switch" else 2) * adapters


def grouped(rows: Sequence[Row], weight_bytes: int, room: int, *, apart: bool) -> tuple[list[list[Row]], list[Row]]:
    """Groups of rows, with the base in each, whose arms take `room` bytes at most; and the rows of arms that take more.

    `room` is what is free when the base, of `weight_bytes`, is there already. If not `apart`, an arm that takes more
    has a group to itself.
    """
    if rows[0].workload.phase == "train":
        room -= 3 * weight_bytes  # full fine-tuning: gradients and AdamW's two moments
    sizes = {row.arm: arm_bytes(row, weight_bytes) for row in rows if row.subject != BASE}
    chosen: list[list[object]] = []
    left = 0
    too_large = {arm for arm, size in sizes.items() if apart and size > room}
    for arm in [arm for arm in sizes if arm not in too_large]:
        if not chosen or sizes[arm] > left:
            chosen.append([])
            left = room
        chosen[-1].append(arm)
        left -= sizes[arm]
    if not sizes:
        return [list(rows)], []
    groups = [[row for row in rows if row.subject == BASE or row.arm in arms] for arms in chosen]
    return groups, [row for row in rows if row.arm in too_large]
