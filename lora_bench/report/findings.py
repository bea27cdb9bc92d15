"""What went wrong in a run, what could not be read, and where its memory went: for every format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from lora_bench.bench.counts import reconciled
from lora_bench.bench.workload import BASE
from lora_bench.report.cells import MEMORY, NOT_MEASURED, adapters

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from lora_bench.bench.result import Result
    from lora_bench.report.run import Measured

PARTS = ("weights", "adapters", "gradients", "optimiser", "activations", "kv_cache", "workspace")
"""What memory is for, by the budget; the constants of a 4-bit base count as weights."""
NO_ENERGY = "not asked for (--lora-energy 10 measures them)"
BEFORE = "the run ended before its turn"
NOT_TOLD = "the records do not tell it"
VERDICTS = ("conforms", "fails", "error", "known", "advice", "inconclusive", "blocked", "not_offered")


class Failed(NamedTuple):
    """A row without times: "wrong", "oom", ... and why."""

    row: str
    kind: str
    reason: str


class Unread(NamedTuple):
    """A probe that could not be read, why, and of how many rows."""

    probe: str
    reason: str
    rows: int


class Memory(NamedTuple):
    """One row's measured peak in bytes, beside what was worked out.

    `parts` are those that are there at the peak: gradients come while the activations go. `unexplained` is what was
    measured beyond them; `context` is the driver's, outside of torch's peak; None where it is not known.
    """

    result: Result
    parts: dict[str, int]
    measured: int
    context: int | None

    @property
    def worked_out(self) -> int:
        return sum(self.parts.values())

    @property
    def unexplained(self) -> int:
        return self.measured - self.worked_out


def failures(run: Measured) -> list[Failed]:
    """The rows that were not measured, in the order of the plan."""
    return [
        Failed(str(result.row), result.kind or NOT_MEASURED, result.failure.removeprefix(f"{result.kind}: ") or BEFORE)
        for result in run.results.values()
        if not result.measured
    ]


def unread(run: Measured) -> list[Unread]:
    """Every probe that says that it was unavailable, each reason once."""
    measured = [result for result in run.results.values() if result.measured]
    counted: dict[tuple[str, str], int] = {}
    for result in measured:
        for found in dict.fromkeys((*_unavailable(result), *_absent(result, run.device))):
            counted[found] = counted.get(found, 0) + 1
    without = sum(not result.energy for result in measured)
    if without:
        counted["joules", NO_ENERGY] = without
    return [Unread(probe.replace("_", " "), reason, rows) for (probe, reason), rows in counted.items()]


def _unavailable(result: Result) -> Iterator[tuple[str, str]]:
    window = {name: value for name, value in result.window.items() if name != "throttled"}  # which repeats the rest
    told = {"window": window, "launches": result.launches, "memory": result.memory, "energy": result.energy}
    for whole, quantities in told.items():
        for name, value in quantities.items():
            if isinstance(value, str) and value.startswith("unavailable ("):
                yield whole if name == "attribution" else name, value.removeprefix("unavailable (").removesuffix(")")
    yield from result.window.get("unavailable", {}).items()


def _absent(result: Result, device: str) -> Iterator[tuple[str, str]]:
    """What later releases measure of such a row, or what the run did not come to."""
    if result.row.workload.phase == "switch" and not result.parts:
        yield "parts of a switch", NOT_TOLD
    if device.startswith("cuda") and not result.launches:
        yield "launches", NOT_TOLD


def memories(results: Iterable[Result], device: str) -> Iterator[Memory]:
    """Those of which a peak was measured, and what it should be is known."""
    for result in results:
        peaks = [result.memory.get(name) for name in MEMORY]
        found = reconciled(result.row.workload, device, result.memory)
        if "unexplained_bytes" not in found:
            continue
        measured = next(peak for peak in peaks if isinstance(peak, int))
        context = result.memory.get("context_bytes")
        yield Memory(result, _parts(found["budget"]), measured, context if isinstance(context, int) else None)


def _parts(budget: Mapping[str, int]) -> dict[str, int]:
    parts = {name: budget[name] for name in PARTS}
    parts["weights"] += budget["quantisation_constants"]
    going = ("activations", "workspace")
    gone = ("gradients",) if parts["gradients"] < sum(parts[name] for name in going) else going
    return parts | dict.fromkeys(gone, 0)


def label(result: Result) -> str:
    """A row within its phase, in short: "batched peft r8 n32 zipf"."""
    of = result.row.workload
    if result.row.subject == BASE:
        return "full" if of.phase == "train" else BASE
    mixed = [f"n{adapters(of)}"] if of.setup == "batched" else []
    return " ".join([of.setup, result.row.subject, f"r{of.rank}", *mixed])


def tally(verdicts: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many checks came to each verdict."""
    found = [str(each.get("status")) for each in verdicts]
    return {status: found.count(status) for status in VERDICTS}


def reasons(subjects: Mapping[str, Iterable[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The verdicts that are not "conforms", those of one subject for one reason together, what failed first."""
    grouped: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for subject, own in subjects.items():
        for each in own:
            if each["status"] != "conforms":
                because = str(each.get("because") or each.get("resembles") or "")
                grouped.setdefault((subject, str(each["status"]), because), []).append(each)
    told = [
        {
            "subject": subject,
            "status": status,
            "because": because,
            "checks": [str(each["check"]) for each in own],
            "replay": next((each["replay"] for each in own if each.get("replay")), ""),
        }
        for (subject, status, because), own in grouped.items()
    ]
    return sorted(told, key=lambda each: VERDICTS.index(each["status"]) if each["status"] in VERDICTS else -1)
