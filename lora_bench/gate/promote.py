"""Making a run the baseline: by hand, only where it passed, and never a regressed one without a reason.

A promoted run is a copy of its records with one more, of the quantity "promotion": when, what it was compared with,
why if it had regressed, and the SHA-256 of the bytes before it. A baseline's folder has one folder for each hard
fingerprint.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_bench.bench.records import SCHEMA, read
from lora_bench.bench.result import recorded
from lora_bench.bench.workload import BASE
from lora_bench.gate.baseline import (
    EXIT_REGRESSION,
    REGRESSION,
    Line,
    choose,
    compare,
    exit_code,
    in_order,
    shelf,
    worth_keeping,
)
from lora_bench.gate.figures import digest, load

if TYPE_CHECKING:
    from pathlib import Path

    from lora_bench.gate.baseline import Shelf
    from lora_bench.gate.figures import Run


class Promotion(NamedTuple):
    """What came of it: the new baseline if there is one, faults of the run, verdicts on it, what was deleted."""

    target: Path | None
    faults: list[str]
    lines: list[Line]
    deleted: list[Path]
    code: int


def promote(path: Path, folder: Path, *, first: bool = False, accepted: str = "") -> Promotion:
    """Copy a run's records into the folder of baselines, and delete those of its fingerprint that are not to be kept.

    Kept are the last ten, and the one that began their history. A history begins with `first`, which is needed where
    there is no baseline of this fingerprint, or with a regression that is `accepted` for a reason.

    Raises ValueError for what is no run, was promoted before or needs `first`, and OSError where it cannot be copied.
    """
    if path.suffix != ".jsonl":
        raise ValueError(f"wanted the records of a run (.jsonl), got {path}")
    run = load(path)
    if run.promotion is not None:
        raise ValueError(f"{path} is a baseline already: promote the records of a run")
    target = folder / run.key / path.name
    if target.exists():
        raise ValueError(f"{path.stem} was promoted before: {target}")
    if unfit := faults(path, run):
        return Promotion(None, unfit, [], [], EXIT_REGRESSION)
    there = shelf(folder)
    if not first and run.key not in {each.key for each in there.runs}:
        raise ValueError(f"{folder} has no baseline of {run.key}: where this is to be the first, say --first")
    lines = _verdicts(run, there, none=not folder.is_dir() or not any(folder.rglob("*.jsonl")))
    counted = [line for line in lines if not (accepted and line.verdict == REGRESSION)]
    if counted and (code := exit_code(counted)):
        return Promotion(None, [], lines, [], code)
    regressed = len(counted) < len(lines)
    told = {"begins": first or regressed, "accepted": accepted if regressed else ""}
    _copy(path, target, told | {"compared": [line._asdict() for line in lines]})
    return Promotion(target, [], lines, _prune(target.parent), 0)


def faults(path: Path, run: Run) -> list[str]:
    """What keeps a run from being a baseline: a planned row that was not measured, not proven right, or throttled."""
    results, found = recorded(read(path)), []
    for row in run.planned:
        if row not in run.rows:
            found.append(f"{row}: not measured")
        elif why := run.rows[row].trouble:
            found.append(f"{row}: {why}")
        elif row.subject != BASE and (proof := results[row].proof) is None:
            found.append(f"{row}: not proven right")
        elif row.subject != BASE and proof is not None and not proof.error_ratio <= 1:
            found.append(f"{row}: proven wrong: its error is {proof.error_ratio:.3g} of the bound")
        elif not any(isinstance(value, int) for value in run.rows[row].memory.values()):
            found.append(f"{row}: its memory was not measured")
    return found


def _verdicts(run: Run, there: Shelf, *, none: bool) -> list[Line]:
    """The run beside its baseline, if there is one; beside other rows of the same machine only what has regressed."""
    lines = [] if none else list(there.trouble)
    history = choose(run, there.runs) if there.runs else []
    if history and history[-1].hard == run.hard:
        same = history[-1].key == run.key
        lines += [line for line in compare(run, history) if same or line.verdict == REGRESSION]
    return lines


def _copy(path: Path, target: Path, told: dict[str, Any]) -> None:
    """Write the records and the promotion's, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    time, records = datetime.now(UTC).isoformat(), path.read_bytes()
    record = {"schema": SCHEMA, "run_id": path.stem, "quantity": "promotion", "time": time} | told
    record["sha256"] = digest(records)
    part = target.with_suffix(".part")
    try:
        with part.open("wb") as file:
            file.write(records + json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    except OSError:
        with suppress(OSError):
            part.unlink()
        raise


def _prune(folder: Path) -> list[Path]:
    """Delete all but the last ten promoted runs of one fingerprint, and the one that began their history."""
    runs = shelf(folder).runs
    kept = {run.name for run in worth_keeping(runs)}
    old = [folder / f"{run.name}.jsonl" for run in in_order(runs) if run.name not in kept]
    for path in old:
        path.unlink()
    return old
