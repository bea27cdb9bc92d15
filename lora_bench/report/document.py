"""Runs as one JSON document, for programs; `schema.json` beside this file says what is in it."""

from __future__ import annotations

import json
import math
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from lora_bench import __version__
from lora_bench.bench.counts import reconciled
from lora_bench.bench.sampling import percentiles
from lora_bench.report import findings
from lora_bench.report.advice import advice, choices
from lora_bench.report.cells import NOT_MEASURED, looked, parts
from lora_bench.report.ranking import correctness, rankings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_bench.bench.ratio import Interval
    from lora_bench.bench.result import Result
    from lora_bench.report.ranking import Ranking
    from lora_bench.report.run import Run

SCHEMA = "lora-bench/report/1"


def document(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything that the other formats show, as figures with their units in their names; no number is infinite."""
    return {"schema": SCHEMA, "lora_bench": __version__, "runs": [_run(run) for run in runs]}


def schema() -> dict[str, Any]:
    """The JSON Schema of a document."""
    return json.loads(files("lora_bench.report").joinpath("schema.json").read_text(encoding="utf-8"))


def _run(run: Run) -> dict[str, Any]:
    results = list(run.results.values())
    return {
        "name": run.name,
        "device": run.device,
        "origin": run.origin,
        "fingerprint": run.fingerprint,
        "ceilings": {dtype: ceilings._asdict() for dtype, ceilings in run.ceilings.items()},
        "rows": [_row(result, run) for result in results],
        "recommendation": [*choices(results), *advice(results)],
        "rankings": [_ranking(each) for each in rankings(results)],
        "unavailable": [each._asdict() for each in findings.unread(run)],
        "comparisons": [_comparison(record) for record in run.comparisons],
        "conformance": run.conformance or None,
    }


def _comparison(record: dict[str, Any]) -> dict[str, Any]:
    from lora_bench.report.compare import compared  # it also starts processes, which no other report asks for

    found = compared(record, "")
    return record | {name: found[name] for name in ("verdict", "because")}


def _row(result: Result, run: Run) -> dict[str, Any]:
    row = result.row
    told: dict[str, Any] = {
        "name": str(row),
        "subject": row.subject,
        "workload": row.workload.as_dict(),
        "status": "measured" if result.measured else result.kind or NOT_MEASURED,
        "reason": result.failure or None,
    }
    if not result.measured:
        return told
    bound = run.bound(row)
    return told | {
        "seconds": bounds(result.latency),
        "ratio_to_base": bounds(result.ratio),
        "interleaved": result.interleaved,
        "tokens_per_second": result.tokens_per_second if row.workload.tokens else None,
        "percentiles_seconds": percentiles(result.seconds),
        "samples": {"counted": len(result.seconds), "taken": len(result.samples.seconds)},
        "bound": bound and bound._asdict() | {"fraction": bound.seconds / result.latency.median},
        "parts_seconds": parts(result),
        "launches": looked(result),
        "memory": result.memory,
        "reconciled": reconciled(row.workload, run.device, result.memory),
        "energy": result.energy,
        "proof": result.proof and result.proof._asdict(),
    }


def bounds(interval: Interval | None) -> dict[str, float | None] | None:
    """An interval by name; an end that is not known is None."""
    if interval is None:
        return None
    return {name: value if math.isfinite(value) else None for name, value in interval._asdict().items()}


def _ranking(ranking: Ranking) -> dict[str, Any]:
    places = [
        {
            "subject": each.subject,
            "place": each.place,
            "tied": each.tied,
            "seconds": bounds(each.latency),
            "ratio_to_fastest": bounds(each.against),
            "correctness": correctness(each.result),
            "remark": each.remark or None,
        }
        for each in ranking.places
    ]
    return {"workload": ranking.workload.as_dict(), "places": places}
