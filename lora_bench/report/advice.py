"""What a run's figures say about a deployment: when to merge, and where mixed batches become dear."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from lora_bench.bench.workload import SETUPS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from lora_bench.bench.result import Result
    from lora_bench.bench.workload import Workload

CLIFF = 1.25
"""A step to more adapters that takes so much longer is called a cliff, where the intervals do not meet."""


def advice(results: Iterable[Result]) -> list[str]:
    """A sentence for each subject and rank that can be said something about, by the medians of a run."""
    measured = [result for result in results if result.measured]
    return [*break_even(measured), *cliffs(measured)]


def choices(results: Iterable[Result]) -> Iterator[str]:
    """For each subject and rank, whether one adapter is better merged, by the ratios to base of a decode step."""
    decoded: dict[tuple[str, int], dict[str, Result]] = {}
    for result in results:
        of = result.row.workload
        if result.measured and result.ratio and of.phase == "decode" and of.setup in ("merged", "separate", "four_bit"):
            decoded.setdefault((result.row.subject, of.rank), {})[of.setup] = result
    for (subject, rank), setups in decoded.items():
        ratios = {setup: result.ratio for setup, result in setups.items() if result.ratio}
        if "merged" in ratios and "separate" in ratios:
            gains = ratios["separate"].low > ratios["merged"].high
            what = "merge it" if gains else "leave it beside the base: merging shows no gain"
            told = ", ".join(f"{setup} {ratios[setup].median:.2f}" for setup in SETUPS if setup in ratios)
            yield f"{subject} r{rank}, one adapter: {what} (a decode step over the base's: {told})"


def break_even(results: list[Result]) -> Iterator[str]:
    """For how many adapters in one batch merging each in its turn is quicker than a mixed batch.

    Serving k of them merged takes k switches, one prefill of all rows in k parts, and for each token k steps, each as
    long as with all rows: decoding fewer rows reads the same weights.
    """
    compared: dict[tuple[str, int], dict[int, float]] = {}
    tokens = 0
    for mixed in results:
        of = mixed.row.workload
        parts = [
            mixed,
            _other(results, mixed, "batched", "prefill"),
            *(_other(results, mixed, "merged", phase) for phase in ("decode", "prefill", "switch")),
        ]
        if (of.setup, of.phase, of.popularity) != ("batched", "decode", "distinct") or None in parts:
            continue
        read, prefill, merged_read, merged_prefill, switch = (part.latency.median for part in parts if part)
        served, tokens = len(set(of.asked)), of.sequence
        merged = served * switch + merged_prefill + tokens * served * merged_read
        compared.setdefault((mixed.row.subject, of.rank), {})[served] = merged / (prefill + tokens * read)
    for (subject, rank), ratios in compared.items():
        told = ", ".join(f"{served}: {ratios[served]:.2f}" for served in sorted(ratios))
        who = f"{subject} r{rank}, {tokens} tokens read and {tokens} written"
        yield f"{who}: {_verdict(ratios)} (merged / mixed, {told})"


def _verdict(ratios: dict[int, float]) -> str:
    quicker = [served for served in sorted(ratios) if ratios[served] < 1]
    if not quicker:
        return f"mix, from {min(ratios)} adapters in a batch on"
    if len(quicker) == len(ratios):
        return f"merge one after the other, up to {max(quicker)} adapters in a batch"
    slower = min(served for served in ratios if served not in quicker)
    most = "1 adapter" if max(quicker) == 1 else f"{max(quicker)} adapters"
    return f"merge up to {most} in a batch, mix from {slower} on"


def _other(results: list[Result], like: Result, setup: str, phase: str) -> Result | None:
    def same(own: Workload) -> bool:
        one, other = own.as_dict(), like.row.workload.as_dict()
        free = {"setup", "phase"} | (set() if setup == "batched" else {"adapters", "popularity"})
        return (own.setup, own.phase) == (setup, phase) and all(one[name] == other[name] for name in one.keys() - free)

    found = (each for each in results if each.row.subject == like.row.subject and same(each.row.workload))
    return next(found, None)


def cliffs(results: list[Result]) -> Iterator[str]:
    """Where one more step on the way to more adapters, or to a higher rank, makes a mixed batch much slower."""
    for name in ("adapters", "rank"):
        rows: dict[tuple[object, ...], list[Result]] = {}
        for result in results:
            own = result.row.workload.as_dict()
            if own["setup"] == "batched" and own["phase"] in ("prefill", "decode"):
                key = result.row.subject, *(value for field, value in own.items() if field != name)
                rows.setdefault(key, []).append(result)
        for sweep in rows.values():
            ordered = sorted(sweep, key=lambda result: getattr(result.row.workload, name))
            for less, more in pairwise(ordered):
                times = more.latency.median / less.latency.median
                if times >= CLIFF and more.latency.low > less.latency.high:
                    one, other = (getattr(result.row.workload, name) for result in (less, more))
                    yield f"{more.row}: {times:.2f} times as long with {name} {other} as with {one}"
