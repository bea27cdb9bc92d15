"""`Run`: one run as its records tell it, for every kind of report."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lora_bench.bench.checked import of_type, row_of
from lora_bench.bench.counts import Bound, Ceilings, bounded
from lora_bench.bench.records import read
from lora_bench.bench.result import Result, recorded

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from lora_bench.bench.workload import Row

CONFORMANCE = "lora-bench/conformance/1"
"""The schema of the verdicts that `lora-bench conform` keeps."""


class NoResult(ValueError):
    """A file that is what it should be, and holds nothing to report: its run ended before its first row."""


class Measured(Protocol):
    """What a report needs of a run: a `Run`, or the `Session` that measures it."""

    @property
    def device(self) -> str: ...
    @property
    def fingerprint(self) -> dict[str, Any]: ...
    @property
    def results(self) -> Mapping[Row, Result]: ...
    @property
    def ceilings(self) -> Mapping[str, Ceilings]: ...
    def bound(self, row: Row) -> Bound | None:
        """The least that the row's step could take; by "launches" where its own launch share says so."""
        ...


@dataclass
class Run:
    """What one file tells: rows with their results, A/B comparisons, or the verdicts of the conformance checks.

    Rows that were planned and never measured are among them. `origin` is the first record's time, git state and, where
    it is known, command.
    """

    name: str
    device: str = ""
    results: dict[Row, Result] = field(default_factory=dict)
    ceilings: dict[str, Ceilings] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    conformance: dict[str, Any] = field(default_factory=dict)

    def bound(self, row: Row) -> Bound | None:
        """The least that the row's step could take on this device; None where that is not known."""
        share = self.results[row].launches.get("launch_share") if row in self.results else None
        return bounded(row.workload, self.ceilings, share if isinstance(share, float) else None)

    @property
    def device_name(self) -> str:
        return device_name(self)


def device_name(run: Measured) -> str:
    """The device's own name; what it was asked for by, where that is not known."""
    return str(run.fingerprint.get("hard", {}).get("device_name", run.device))


def load(path: Path) -> Run:
    """The run of a record file (.jsonl), or the verdicts of a conformance file (.json).

    Raises ValueError naming the file: it is not there or is neither; NoResult where it holds nothing to report.
    """
    try:
        return _verdicts(path) if path.suffix == ".json" else _recorded(path)
    except (RecursionError, TypeError) as error:  # what is nested without end, or old and not of its schema
        raise ValueError(f"{path} cannot be read: {error}") from None


def _recorded(path: Path) -> Run:
    records = read(path)
    quantities: dict[str, list[dict[str, Any]]] = {}
    try:
        told = recorded(records)
        for record in records:
            quantities.setdefault(record["quantity"], []).append(record)
        results = {row: Result(row) for row in _planned(quantities.get("plan", []))} | told
        for lost in (each for each in quantities.get("failure", []) if each["kind"] == "gpu_lost"):
            result = results.setdefault(row := row_of(lost), Result(row))
            if result.pending:
                result.kind, result.failure = lost["kind"], lost["text"]
        ceilings = {each["dtype"]: Ceilings(**each["ceilings"]) for each in reversed(quantities.get("ceilings", []))}
        for record in quantities.get("ab", []):
            _compared(record)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be reported: {error}") from None
    if not results and "ab" not in quantities:
        raise NoResult(f"{path} holds no result to report")
    return Run(
        name=str(records[0].get("run_id", path.stem)),
        device=next((str(each["device"]) for each in records if each.get("device")), ""),
        results=results,
        ceilings=ceilings,
        fingerprint=next((each["fingerprint"] for each in reversed(records) if each.get("fingerprint")), {}),
        origin={name: records[0][name] for name in ("time", "git", "command") if records[0].get(name)},
        comparisons=quantities.get("ab", []),
    )


def _planned(plans: list[dict[str, Any]]) -> Iterator[Row]:
    for plan in plans:
        yield from map(row_of, plan["rows"])


def _compared(record: dict[str, Any]) -> None:
    """Raise ValueError for a comparison that no report could show."""
    from lora_bench.report.compare import compared  # with what starts processes, which no other record asks for

    compared(record, "")


def _verdicts(path: Path) -> Run:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        schema, subjects = kept["schema"], kept["subjects"]
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} holds no verdicts of lora-bench conform") from None
    if schema != CONFORMANCE or not isinstance(subjects, dict):
        raise ValueError(f"{path} is of schema {schema}, wanted {CONFORMANCE}")
    try:
        for name, own in subjects.items():
            for each in of_type(own, list, name):
                for field_of in ("check", "status"):
                    of_type(each[field_of], str, f"{name}: {field_of}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be reported: {error}") from None
    return Run(name=path.stem, conformance=kept)
