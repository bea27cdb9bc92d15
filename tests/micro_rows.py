"""Rows of the micro model."""

from __future__ import annotations

from typing import Any

from lora_bench.bench.workload import Row, Workload


def row(subject: str, setup: str, phase: str, **changes: Any) -> Row:
    fields: dict[str, Any] = {"model": "micro", "dtype": "fp32", "rank": 4, "batch": 2, "sequence": 6}
    return Row(subject, Workload(setup, phase, **fields | changes))


def with_bases(*rows: Row) -> list[Row]:
    return list(dict.fromkeys([*(row.base() for row in rows), *rows]))
