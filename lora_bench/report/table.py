"""The result of a run as a table for the terminal."""

from __future__ import annotations

import math
from io import StringIO
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from lora_bench.bench.workload import BASE, PHASES, SETUPS
from lora_bench.report.advice import advice

if TYPE_CHECKING:
    from lora_bench.bench.counts import Bound
    from lora_bench.bench.ratio import Interval
    from lora_bench.bench.result import Result
    from lora_bench.bench.session import Session
    from lora_bench.bench.workload import Workload

WIDTH = 100
MEMORY = {
    "allocated_peak_bytes": "torch allocated peak",
    "resident_peak_bytes": "resident set peak",
}


def render(session: Session) -> str:
    """One table a phase: set-up x subject with latency, ratio to base, tokens per second and peak memory."""
    output = StringIO()
    console = Console(file=output, width=WIDTH, no_color=True, highlight=False, markup=False, emoji=False)
    for phase in PHASES:
        results = [result for result in session.results.values() if result.row.workload.phase == phase]
        if results:
            console.print(_phase_table(phase, results, session))
            console.print()
    device = session.fingerprint.get("hard", {}).get("device_name", session.device)
    notes = [
        f"device={session.device} ({device})",
        "medians with 95 % intervals",
        "x base: median of the ratios of samples taken in the same round",
        "n: adapters that a mixed batch asks for",
        "samples: those that count / all",
        f"bound: the least time that {_ceilings(session)} allow, as a share of this one",
        "MiB: " + "; ".join(_memory_notes(session)),
    ]
    console.print("; ".join(notes) + ".")
    if said := advice(session.results.values()):
        console.print("\nBy the medians:")
        for sentence in said:
            console.print(f"- {sentence}")
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines())


def _ceilings(session: Session) -> str:
    """What the device was seen to reach, in words."""
    reached = [
        f"{each.flops_per_second / 1e9:,.0f} GFLOP/s ({dtype}) and {each.bytes_per_second / 1e9:,.1f} GB/s"
        for dtype, each in session.ceilings.items()
    ]
    return " or ".join(reached) or "unknown ceilings"


def _phase_table(phase: str, results: list[Result], session: Session) -> Table:
    workload = results[0].row.workload
    read = "to other adapters" if phase == "switch" else f"batch {workload.batch} x {workload.sequence} tokens"
    title = f"{phase}: {workload.model} {workload.dtype}, {read}, device={session.device}"
    table = Table(title=title, title_justify="left", title_style="", box=None, pad_edge=False)
    for name in ("set-up", "subject"):
        table.add_column(name, overflow="fold")
    for name in ("r", "n", "ms", "x base", "tokens/s", "bound", "MiB", "samples"):
        table.add_column(name, justify="right", no_wrap=True)
    # Within a set-up the subjects stay in the order in which they were asked for.
    for result in sorted(results, key=lambda result: SETUPS.index(result.row.workload.setup)):
        table.add_row(*_cells(result, session.bound(result.row)))
    return table


def _cells(result: Result, bound: Bound | None) -> list[str]:
    workload = result.row.workload
    full = result.row.subject == BASE and workload.phase == "train"
    which = [
        "full" if full else workload.setup,
        "" if result.row.subject == BASE else result.row.subject,
        str(workload.rank or ""),
        _adapters(workload),
    ]
    if not result.measured:
        return [*which, result.kind or "not measured"]
    latency, ratio = result.latency, result.ratio
    off = max(latency.high - latency.median, latency.median - latency.low) / latency.median
    milliseconds = f"{_milliseconds(latency.median)} ±{off:.0%}" if off < math.inf else _milliseconds(latency.median)
    times = "1" if result.row.subject == BASE else _interval(ratio) if ratio else "no base"
    share = "" if bound is None else f"{bound.seconds / latency.median:.0%} {bound.by}"
    throughput = f"{result.tokens_per_second:,.0f}" if workload.tokens else ""
    counted, taken = len(result.seconds), len(result.samples.seconds)
    samples = str(taken) if counted == taken else f"{counted}/{taken}"
    return [*which, milliseconds, times, throughput, share, peak(result), samples]


def _adapters(workload: Workload) -> str:
    if workload.setup != "batched":
        return ""
    return str(workload.adapters) + ("" if workload.popularity == "distinct" else f" {workload.popularity}")


def _interval(interval: Interval) -> str:
    return f"{interval.median:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _milliseconds(seconds: float) -> str:
    """To four digits, but never with an exponent."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 1e3 else f"{value:.4g}"


def peak(result: Result) -> str:
    """The peak that the device's kind is judged by, in MiB."""
    for name in MEMORY:
        if isinstance(value := result.memory.get(name), int):
            return f"{value / 2**20:,.0f}"
    return "n/a"


def _memory_notes(session: Session) -> list[str]:
    used = {name for result in session.results.values() for name in MEMORY if isinstance(result.memory.get(name), int)}
    return [f"{MEMORY[name]} in a process of its own" for name in sorted(used)] or ["n/a, and the records say why"]
