"""The result of a run as a table for the terminal."""

from __future__ import annotations

from io import StringIO
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from lora_bench.bench.workload import BASE, PHASES, SETUPS

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_bench.bench.ratio import Interval
    from lora_bench.bench.session import Result, Session

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
            console.print(_phase_table(phase, results, session.device))
            console.print()
    device = session.fingerprint.get("hard", {}).get("device_name", session.device)
    console.print(f"device={session.device} ({device}); medians with 95 % intervals; x base: median of the ratios")
    console.print("of samples taken in the same round; memory: " + "; ".join(_memory_notes(session)) + ".")
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines())


def _phase_table(phase: str, results: list[Result], device: str) -> Table:
    workload = results[0].row.workload
    adapters = max(result.row.workload.adapters for result in results)
    title = (
        f"{phase}: {workload.model} {workload.dtype}, batch {workload.batch} x {workload.sequence} tokens, "
        f"rank {max(result.row.workload.rank for result in results)}"
        + (f", {adapters} adapters batched" if adapters > 1 else "")
        + f", device={device}"
    )
    table = Table(title=title, title_justify="left", title_style="", box=None, pad_edge=False)
    for name in ("set-up", "subject"):
        table.add_column(name, overflow="fold")
    for name in ("ms", "x base", "tokens/s", "peak MiB", "samples"):
        table.add_column(name, justify="right")
    # Within a set-up the subjects stay in the order in which they were asked for.
    for result in sorted(results, key=lambda result: SETUPS.index(result.row.workload.setup)):
        table.add_row(*_cells(result))
    return table


def _cells(result: Result) -> list[str]:
    workload = result.row.workload
    setup = "full fine-tuning" if result.row.arm == (BASE, BASE) and workload.phase == "train" else workload.setup
    subject = "" if result.row.subject == BASE else result.row.subject
    if not result.seconds:
        return [setup, subject, "failed"]
    latency, ratio = result.latency, result.ratio
    milliseconds = _interval(latency, _milliseconds)
    times = "1" if result.row.subject == BASE else _interval(ratio, "{:.3f}".format) if ratio else "no base"
    return [
        setup,
        subject,
        milliseconds,
        times,
        f"{result.tokens_per_second:,.0f}",
        peak(result),
        str(len(result.seconds)),
    ]


def _interval(interval: Interval, text: Callable[[float], str]) -> str:
    return f"{text(interval.median)} [{text(interval.low)}, {text(interval.high)}]"


def _milliseconds(seconds: float) -> str:
    """To four digits, but never with an exponent."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 1e3 else f"{value:.4g}"


def peak(result: Result) -> str:
    """The peak that the device's kind is judged by, in MiB."""
    for name in MEMORY:
        if isinstance(value := result.memory.get(name), int):
            return f"{value / 2**20:,.0f}"
    return "unavailable"


def _memory_notes(session: Session) -> list[str]:
    used = {name for result in session.results.values() for name in MEMORY if isinstance(result.memory.get(name), int)}
    return [f"{MEMORY[name]} in a process of its own" for name in sorted(used)] or ["unavailable"]
