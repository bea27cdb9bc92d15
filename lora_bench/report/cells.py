"""The columns of a run's table, for every format: each cell as it is read, and as it is sorted."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_bench.bench.clocks import power_capped
from lora_bench.bench.workload import BASE, SETUPS
from lora_bench.models.presets import widths

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from lora_bench.bench.ratio import Interval
    from lora_bench.bench.result import Result
    from lora_bench.bench.workload import Workload
    from lora_bench.report.run import Measured

MEMORY = {
    "allocated_peak_bytes": "torch allocated peak",
    "resident_peak_bytes": "resident set peak",
}
MIB = 2**20
WORDS = ("set-up", "subject")
LOOKED = {"graph": "graph_seconds", "cold": "cold_seconds"}
DETAILS = ("evict", "load", "merge", "pool", *LOOKED, "launch share")
"""The parts of a switch, and what a GPU told beside the hot samples: only some rows have them."""
COLUMNS = (*WORDS, "r", "n", "ms", *DETAILS, "x base", "tokens/s", "bound", "MiB", "J/token", "samples")
"""Words stand on the left, figures on the right."""
NOT_MEASURED = "not measured"


class Cell(NamedTuple):
    """What is read, and the number that it is sorted by; None for a word, and where there is no number."""

    text: str
    value: float | None = None


def phase_results(run: Measured, phase: str) -> list[Result]:
    """Those of a phase by set-up; within one the subjects stay in the order in which they were asked for."""
    results = [result for result in run.results.values() if result.row.workload.phase == phase]
    return sorted(results, key=lambda result: SETUPS.index(result.row.workload.setup))


def phase_title(results: Sequence[Result], device: str) -> str:
    """What the results of a phase have in common."""
    workload = results[0].row.workload
    what = "rows" if widths(workload.model) else "tokens"
    read = "to other adapters" if workload.phase == "switch" else f"batch {workload.batch} x {workload.sequence} {what}"
    others = dict.fromkeys(result.row.workload.targets for result in results if result.row.workload.targets != "all")
    named = "".join(f", targets {each}" for each in others)
    return f"{workload.phase}: {workload.model} {workload.dtype}{named}, {read}, device={device}"


def cells(result: Result, run: Measured) -> dict[str, Cell]:
    """A cell for each of `COLUMNS`; where nothing was measured, "x base" (the widest) says what went wrong."""
    row, workload = result.row, result.row.workload
    full = row.subject == BASE and workload.phase == "train"
    found = dict.fromkeys(COLUMNS, Cell("")) | {
        "set-up": Cell("full" if full else workload.setup),
        "subject": Cell("" if row.subject == BASE else row.subject),
        "r": _whole(workload.rank),
        "n": Cell(adapters(workload), workload.adapters) if workload.setup == "batched" else Cell(""),
    }
    if not result.measured:
        return found | {"x base": Cell(result.kind or NOT_MEASURED)}
    latency, bound = result.latency, run.bound(row)
    counted, taken = len(result.seconds), len(result.samples.seconds)
    return found | {
        "ms": Cell(spread(latency), latency.median * 1e3),
        **_details(result),
        "x base": _times(result),
        "tokens/s": Cell(f"{result.tokens_per_second:,.0f}", result.tokens_per_second) if workload.tokens else Cell(""),
        "bound": Cell("")
        if bound is None
        else Cell(f"{bound.seconds / latency.median:.0%} {bound.by}", bound.seconds / latency.median),
        "MiB": peak(result.memory),
        "J/token": joules(result.energy),
        "samples": Cell(str(taken) if counted == taken else f"{counted}/{taken}", counted),
    }


def columns(rows: Sequence[dict[str, Cell]]) -> list[str]:
    """Those of `COLUMNS` in which a row says something; of `DETAILS`, those in which one has a number."""
    return [
        name
        for name in COLUMNS
        if any(row[name].value is not None if name in DETAILS else row[name].text for row in rows)
    ]


def parts(result: Result) -> dict[str, float]:
    """Median seconds of each part of a step, in the rounds that count."""
    return {name: statistics.median(own[number] for number in result.rounds) for name, own in result.parts.items()}


def looked(result: Result) -> dict[str, float | str]:
    """What a GPU told beside the hot samples: median seconds and the share of launching, or why there is none."""
    return {
        name: statistics.median(found) if isinstance(found, list) else found for name, found in result.launches.items()
    }


def _details(result: Result) -> dict[str, Cell]:
    told = looked(result)
    found = {name: Cell(milliseconds(seconds), seconds * 1e3) for name, seconds in parts(result).items()}
    for column, name in LOOKED.items():
        seconds = told.get(name, "")
        found[column] = _lacking(seconds) if isinstance(seconds, str) else Cell(milliseconds(seconds), seconds * 1e3)
    share = told.get("launch_share", "")
    return found | {"launch share": _lacking(share) if isinstance(share, str) else Cell(f"{share:.0%}", share)}


def _lacking(why: str) -> Cell:
    """Nothing where nobody asked, "n/a" where it was asked for in vain."""
    return Cell("n/a" if why else "")


def _whole(value: int) -> Cell:
    return Cell(str(value), value) if value else Cell("")


def _times(result: Result) -> Cell:
    if result.row.subject == BASE:
        return Cell("1", 1.0)
    if not result.ratio:
        return Cell("no base")
    return Cell(interval(result.ratio) + ("" if result.interleaved else "~"), result.ratio.median)


def _apart(result: Result) -> bool:
    return bool(result.base.seconds) and not result.interleaved


def adapters(workload: Workload) -> str:
    """How many a mixed batch may ask for, and how it asks if not each in turn."""
    return str(workload.adapters) + ("" if workload.popularity == "distinct" else f" {workload.popularity}")


def interval(of: Interval) -> str:
    """A ratio with its interval."""
    return f"{of.median:.3f} [{of.low:.3f}, {of.high:.3f}]"


def spread(of: Interval) -> str:
    """Milliseconds ± the further end of the interval, where it has one."""
    off = max(of.high - of.median, of.median - of.low) / of.median
    return f"{milliseconds(of.median)} ±{off:.0%}" if off < math.inf else milliseconds(of.median)


def milliseconds(seconds: float) -> str:
    """To four digits, but never with an exponent."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 1e3 else f"{value:.4g}"


def peak(memory: dict[str, Any]) -> Cell:
    """The peak that the device's kind is judged by, in MiB."""
    for name in MEMORY:
        if isinstance(value := memory.get(name), int):
            return Cell(f"{value / MIB:,.0f}", value / MIB)
    return Cell("n/a")


def joules(energy: dict[str, Any]) -> Cell:
    """Joules for each token, "n/a" where they were asked for in vain; with a question mark where they are not sure."""
    value = energy.get("joules_per_token")
    if not isinstance(value, int | float):
        return Cell("n/a" if energy else "")
    return Cell(f"{value:.3g}" + ("" if energy.get("validity") == "verified" else "?"), value)


def memory_notes(results: Collection[Result]) -> list[str]:
    """Which peak was taken, in words."""
    used = {name for result in results for name in MEMORY if isinstance(result.memory.get(name), int)}
    if not used and any(result.memory for result in results):
        return ["n/a, and the records say why"]
    return [f"{MEMORY[name]} in a process of its own" for name in sorted(used)] or [NOT_MEASURED]


def reached(run: Measured) -> str:
    """What the device was seen to reach, in words."""
    told = [
        f"{each.flops_per_second / 1e9:,.0f} GFLOP/s ({dtype}) and {each.bytes_per_second / 1e9:,.1f} GB/s"
        for dtype, each in run.ceilings.items()
    ]
    return " or ".join(told) or "unknown ceilings"


def notes(run: Measured) -> list[str]:
    """What the columns mean, in the terminal's order."""
    said = [
        "medians with 95 % intervals",
        "x base: median of the ratios of samples taken in the same round",
        *(["~: not interleaved, its base ran before and after it"] if any(map(_apart, run.results.values())) else []),
        "n: adapters that a mixed batch asks for",
        "samples: those that count / all",
        f"bound: the least time that {reached(run)} allow, as a share of this one",
        "MiB: " + "; ".join(memory_notes(run.results.values())),
    ]
    if any(result.parts for result in run.results.values()):
        said.append("evict, load, merge, pool: what a switch is made of, ms")
    if any(result.launches for result in run.results.values()):
        said.append("graph: replays of a CUDA graph, ms; cold: with nothing left in the L2 cache, ms")
        said.append("launch share: how much of a step the device waits for launches")
    if capped := max((power_capped(result.window) for result in run.results.values()), default=0.0):
        said.append(f"the GPU kept to its power limit, at lower clocks, for up to {capped:.0%} of a comparison's time")
    if energy := [result.energy for result in run.results.values() if result.energy]:
        said.append("J/token: a run of its own, idle power included")
        if any(joules(each).text.endswith("?") for each in energy):
            said.append("?: not verified")
    return said
