"""A run's figures as the lists that dashboards read: github-action-benchmark, Bencher, Otava."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_bench.report.cells import MEMORY
from lora_bench.report.run import device_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lora_bench.bench.result import Result
    from lora_bench.report.run import Measured, Run


class Figure(NamedTuple):
    """One figure of one row, in the unit of its name; `low` and `high` are its interval, where it has one."""

    row: str
    quantity: str
    unit: str
    value: float
    low: float | None = None
    high: float | None = None

    @property
    def name(self) -> str:
        return f"{self.row} {self.quantity}"


def figures(run: Measured) -> Iterator[Figure]:
    """Seconds, tokens per second, peak bytes and joules of one step, of each row that was measured."""
    for row, result in run.results.items():
        if not result.measured:
            continue
        latency, tokens = result.latency, row.workload.tokens
        bounded = math.isfinite(latency.high)
        ends = (latency.low, latency.high) if bounded else (None, None)
        yield Figure(str(row), "seconds", "s", latency.median, *ends)
        if tokens:
            low, high = (tokens / end for end in (latency.high, latency.low)) if bounded else (None, None)
            yield Figure(str(row), "throughput", "tokens/s", tokens / latency.median, low, high)
        if (peak := peak_bytes(result)) is not None:
            yield Figure(str(row), "peak", "bytes", peak)
        joules, validity = result.energy.get("joules_per_step"), str(result.energy.get("validity"))
        if isinstance(joules, float | int) and not validity.startswith("invalid"):
            yield Figure(str(row), "energy", "J", joules)


def peak_bytes(result: Result) -> int | None:
    """The peak that the device's kind is judged by; None where it is not known."""
    known = (result.memory.get(name) for name in MEMORY)
    return next((value for value in known if isinstance(value, int)), None)


def smaller(run: Measured) -> list[dict[str, Any]]:
    """For github-action-benchmark's customSmallerIsBetter: seconds, peak bytes and joules of each row."""
    return [_entry(each, run) for each in figures(run) if each.quantity != "throughput"]


def bigger(run: Measured) -> list[dict[str, Any]]:
    """For github-action-benchmark's customBiggerIsBetter: tokens per second of each row."""
    return [_entry(each, run) for each in figures(run) if each.quantity == "throughput"]


def _entry(figure: Figure, run: Measured) -> dict[str, Any]:
    entry = {"name": figure.name, "unit": figure.unit, "value": figure.value, "extra": machine(run)}
    return entry if figure.low is None else entry | {"range": f"[{figure.low:.6g}, {figure.high:.6g}]"}


def machine(run: Measured) -> str:
    """The device and what of the machine must be equal before figures are compared."""
    hard = {name: value for name, value in run.fingerprint.get("hard", {}).items() if name != "device_name"}
    return f"{device_name(run)}: " + ", ".join(f"{name} {value}" for name, value in hard.items())


def bencher(run: Measured) -> dict[str, dict[str, dict[str, float]]]:
    """Bencher Metric Format: a benchmark for each row, a measure for each quantity."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for each in figures(run):
        metric = {"value": each.value}
        if each.low is not None and each.high is not None:
            metric |= {"lower_value": each.low, "upper_value": each.high}
        found.setdefault(each.row, {})[each.quantity] = metric
    return found


def otava(run: Measured, time: str, commit: str) -> str:
    """A CSV of one line for Otava: the time, the commit, a column for each figure."""
    output, found = io.StringIO(), list(figures(run))
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow(["time", "commit", *(each.name for each in found)])
    writer.writerow([time, commit, *(each.value for each in found)])
    return output.getvalue()


def texts(run: Run) -> dict[str, Callable[[], str]]:
    """Each list by the end of its file's name, made when it is called; none of a run that measured no row."""
    if not run.results:
        return {}
    time, commit = str(run.origin.get("time", "")), (run.origin.get("git") or {}).get("sha", "")
    return {
        "smaller.json": lambda: json.dumps(smaller(run), indent=1),
        "bigger.json": lambda: json.dumps(bigger(run), indent=1),
        "bencher.json": lambda: json.dumps(bencher(run), indent=1),
        "otava.csv": lambda: otava(run, time, commit),
    }
