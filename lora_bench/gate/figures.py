"""`Run`: what a stored baseline compares of a run, read from the run itself, its records or its --benchmark-json."""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_bench.bench.checked import fingerprint_of, of_type, row_of, window_of
from lora_bench.bench.clocks import USUAL
from lora_bench.bench.ratio import Interval

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from lora_bench.bench.result import Result
    from lora_bench.bench.workload import Row


class Figures(NamedTuple):
    """What is compared of one row; `trouble` says why its times can be compared with nothing, or is empty.

    `noise` is the relative change that equals show on its machine, where that was calibrated; `interleaved` says
    whether the ratio is one of rounds, or to runs of the base before and after.
    """

    memory: Mapping[str, Any]
    ratio: Interval | None
    trouble: str
    noise: float = 0.0
    interleaved: bool = True


class Run(NamedTuple):
    """One run: the machine, the rows that were planned, the figures of those that were measured.

    `promotion` is the record with which it became a baseline; None where it never did.
    """

    name: str
    fingerprint: Mapping[str, Any]
    planned: tuple[Row, ...]
    rows: Mapping[Row, Figures]
    promotion: Mapping[str, Any] | None = None

    @property
    def hard(self) -> dict[str, Any]:
        """What must be equal before two runs may be compared."""
        return dict(self.fingerprint.get("hard", {}))

    @property
    def key(self) -> str:
        """The hard fingerprint in short, scenarios and all: the name of the device, and a hash."""
        scenarios = sorted(json.dumps([row.subject, row.workload.as_dict()]) for row in self.planned)
        digest = hashlib.sha256(json.dumps([self.hard, scenarios], sort_keys=True).encode()).hexdigest()
        name = "".join(each if each.isalnum() else "-" for each in str(self.hard.get("device_name", "unknown")))
        return f"{'-'.join(filter(None, name.split('-')))[:40]}-{digest[:12]}"


def trouble(seconds: Sequence[float], base: Sequence[float], window: Mapping[str, Any]) -> str:
    """Why these samples can be compared with nothing; empty where they can."""
    if not seconds:
        return "no samples"
    for value in [*seconds, *base]:
        if not 0 < value < math.inf:
            return f"a sample of {value:g} s"
    moved = [name for name, by in window.get("throttle_delta", {}).items() if by]
    if window.get("throttled") is True and moved != [USUAL]:  # which older records have called throttled
        reasons = ", ".join(name for name in moved if name != USUAL)
        return f"the clock was throttled ({reasons or 'no reason told'})"
    return ""


def of_results(
    name: str,
    fingerprint: Mapping[str, Any],
    planned: Iterable[Row],
    results: Mapping[Row, Result],
) -> Run:
    """A run by its results; those of rows that were not planned are left out."""
    rows = {row: _figures(results[row]) for row in planned if row in results and not results[row].pending}
    return Run(name, fingerprint, tuple(planned), rows)


def _figures(result: Result) -> Figures:
    why = result.failure or trouble(result.samples.seconds, result.base.seconds, result.window)
    ratio = None if result.failure or why.startswith(("no samples", "a sample")) else result.ratio
    return Figures(result.memory, ratio, why, interleaved=result.interleaved)


def load(path: Path) -> Run:
    """A run's records (.jsonl), or what --benchmark-json wrote of it.

    Raises ValueError naming the file and what is wrong with it: absent, corrupt, cut off, of another schema, without a
    row of the GPU suites, of several machines; promoted, and changed since or without a plan.
    """
    if not path.exists():
        raise ValueError(f"there is no file {path}")
    try:
        run = _of_records(path) if path.suffix == ".jsonl" else _of_json(path)
    except (RecursionError, TypeError) as error:  # what is nested without end, or old and not of its schema
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not run.rows:
        raise ValueError(f"{path} holds no result of the GPU suites")
    return run


def _of_records(path: Path) -> Run:
    from lora_bench.bench.records import read
    from lora_bench.bench.result import recorded

    records = read(path)
    whole = path.read_bytes()
    if not whole.endswith(b"\n"):
        raise ValueError(f"{path} is cut off: its last line does not end")
    try:
        results = recorded(records)
        plans = [record["rows"] for record in records if record["quantity"] == "plan"]
        planned = list(map(row_of, plans[0])) if plans else list(results)
        prints = [fingerprint_of(record) for record in records if record.get("fingerprint")]
        run = of_results(path.stem, _one(prints), planned, results)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no run of the GPU suites: {type(error).__name__}: {error}") from None
    promotions = [record for record in records if record["quantity"] == "promotion"]
    if promotions and (records[-1] != promotions[-1] or promotions[-1].get("sha256") != digest(_but_last(whole))):
        raise ValueError(f"{path} was changed after it was promoted")
    if promotions and not plans:
        raise ValueError(f"{path} was promoted without a plan")
    return run._replace(promotion=promotions[-1] if promotions else None)


def digest(records: bytes) -> str:
    """What a promotion keeps of the records before it, so that a change is seen."""
    return hashlib.sha256(records).hexdigest()


def _but_last(lines: bytes) -> bytes:
    return lines[: lines.rfind(b"\n", 0, -1) + 1]


def _of_json(path: Path) -> Run:
    try:
        benchmarks = json.loads(path.read_text())["benchmarks"]
        infos = [(each["extra_info"], each.get("stats", {})) for each in benchmarks]
        ours = [(info, stats.get("data", [])) for info, stats in infos if "workload" in info]
        rows = {row_of(info): _told(info, data) for info, data in ours}
        run = Run(path.stem, _one([fingerprint_of(info) for info, _ in ours]), tuple(rows), rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no JSON of --benchmark-json: {type(error).__name__}: {error}") from None
    return run


def _told(info: Mapping[str, Any], data: Sequence[float]) -> Figures:
    told = info["ratio_to_base"]
    ratio = None if told is None else Interval(*(of_type(told[end], float, end) for end in ("median", "low", "high")))
    memory, why = of_type(info["memory"], dict, "memory"), trouble(data, (), window_of(info))
    return Figures(memory, ratio, why, interleaved=info.get("interleaved", True) is True)


def _one(fingerprints: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The machine of a run: the last that is told, where all are the same."""
    if not fingerprints:
        return {}
    if any(each["hard"] != fingerprints[0]["hard"] for each in fingerprints):
        raise ValueError("rows of more than one machine")
    return fingerprints[-1]
