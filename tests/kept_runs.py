"""Record files of runs that never were."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_bench.bench.records import SCHEMA
from lora_bench.bench.result import Result
from lora_bench.bench.workload import BASE, Row
from lora_bench.gate.figures import digest
from tests.micro_rows import row
from tests.scripted_workers import MEMORY, PROOF, WINDOW, samples

MINE = row("mine", "separate", "decode")
ROWS = (MINE.base(), MINE)
HARD: dict[str, Any] = {"device_name": "A GPU", "driver": "580"}


def place(of: Row) -> dict[str, Any]:
    return {"subject": of.subject, "workload": of.workload.as_dict()}


def result(of: Row, seconds: float) -> Result:
    base = of.subject == BASE
    return Result(of, samples(0.5 if base else seconds), samples(0.5), proof=None if base else PROOF, window=WINDOW)


def lines(*, seconds: float = 1.0, hard: dict[str, Any] = HARD, rows: Sequence[Row] = ROWS) -> list[dict[str, Any]]:
    """The records of a whole run: the plan, then times and memory of each row."""
    told: list[dict[str, Any]] = [{"quantity": "plan", "rows": [place(of) for of in rows]}]
    fingerprint = {"hard": hard, "soft": {}}
    for of in rows:
        own = place(of) | {"fingerprint": fingerprint}
        told.append(own | result(of, seconds).timed())
        told.append(own | {"quantity": "memory", "memory": MEMORY})
    return [{"schema": SCHEMA} | each for each in told]


def keep(path: Path, told: Sequence[dict[str, Any]]) -> Path:
    """Write records."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(sealed(told))
    return path


def sealed(told: Sequence[dict[str, Any]]) -> bytes:
    """The lines of a file of records; a promotion gets the digest of those before it."""
    text = b""
    for each in told:
        own = {"sha256": digest(text)} if each["quantity"] == "promotion" else {}
        text += json.dumps(each | own).encode() + b"\n"
    return text


def promotion(number: int, **fields: Any) -> dict[str, Any]:
    """The record that makes a run the baseline of day `number`."""
    told = {"schema": SCHEMA, "quantity": "promotion", "time": f"2026-01-{number:02}", "begins": False, "accepted": ""}
    return told | fields
