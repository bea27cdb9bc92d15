"""Record files made by hand: runs with failures, joules and probes that could not be read, and A/B comparisons."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from lora_bench.bench.workload import BASE, Row, Workload

HOSTILE = "<script>alert(1)</script>"
FACTORS = {"base": 1.0, "merged": 1.0, "separate": 1.15, "batched": 1.4, "four_bit": 1.6}
FAILURES = {("oom", "CUDA out of memory"), ("crashed", "signal 9"), ("timeout", "600 s"), ("wrong", "layers.0.q_proj")}
HARD = {"device": "cuda", "device_name": "A GPU", "torch": "2.13.0"}


def rows(subjects: tuple[str, ...], ranks: tuple[int, ...], counts: tuple[int, ...]) -> list[Row]:
    """A base and every set-up of each phase of the micro model."""
    made = []
    for phase in ("prefill", "decode"):
        place: dict[str, Any] = {"phase": phase, "model": "micro", "dtype": "fp32", "batch": 2, "sequence": 8}
        made.append(Row(BASE, Workload(BASE, rank=0, **place)))
        for setup in ("merged", "separate", "batched", "four_bit"):
            several = counts if setup == "batched" else (1,)
            workloads = [Workload(setup, rank=rank, adapters=n, **place) for rank in ranks for n in several]
            made += [Row(subject, workload) for workload in workloads for subject in subjects]
    return made


def record(of: Row, quantity: str, **fields: Any) -> dict[str, Any]:
    place = {
        "subject": of.subject,
        "workload": of.workload.as_dict(),
        "device": "cuda:0",
        "fingerprint": {"hard": HARD},
    }
    return (
        {"schema": 2, "run_id": "made", "time": "2026-01-02T03:04:05+00:00"} | place | {"quantity": quantity} | fields
    )


def latency(of: Row, seconds: list[float], base: list[float], proof: float | None = 0.25) -> dict[str, Any]:
    """The times of a row; those of the base say that they shared its rounds."""
    timed: dict[str, Any] = {"samples_seconds": seconds, "order": list(range(len(seconds)))}
    timed |= {"base_samples_seconds": base, "base_order": list(range(len(base))), "interleaved_with": []}
    timed |= {"interrupted": [False] * len(seconds), "base_interrupted": [False] * len(base)}
    timed["window"] = {"clocks": [], "unavailable": {"clock": "the driver would not tell"}}
    timed["correctness"] = None if proof is None else {"checks": 7, "error_ratio": proof, "visibility": 9.0}
    return record(of, "latency", **timed)


def run(
    folder: Path,
    subjects: tuple[str, ...] = ("reference", "peft", HOSTILE),
    ranks: tuple[int, ...] = (4, 8),
    counts: tuple[int, ...] = (1, 4),
    every: int = 7,
) -> Path:
    """A run on a GPU in which each `every`-th row failed and the last one was never reached."""
    planned, draw = rows(subjects, ranks, counts), random.Random(0)
    base = {phase: [2e-3 * draw.uniform(0.97, 1.03) for _ in range(12)] for phase in ("prefill", "decode")}
    lines: list[dict[str, Any]] = [
        {"schema": 2, "run_id": "made", "time": "2026-01-02T03:04:05+00:00", "quantity": "plan", "device": "cuda:0"}
        | {"rows": [{"subject": row.subject, "workload": row.workload.as_dict()} for row in planned]},
        {"schema": 2, "quantity": "ceilings", "dtype": "fp32"}
        | {"ceilings": {"bytes_per_second": 2e9, "flops_per_second": 5e10}},
    ]
    for number, row in enumerate(planned[:-1]):
        own = base[row.workload.phase]
        if row.subject != BASE and number % every == 0:
            kind, text = sorted(FAILURES)[number // every % len(FAILURES)]
            lines.append(record(row, "failure", kind=kind, text=f"{kind}: {text}"))
            continue
        slower = FACTORS[row.workload.setup] * (1 + 0.01 * row.workload.adapters + subjects.index(row.subject) / 50
                                                if row.subject != BASE else 1)  # fmt: skip
        taken = [slower * each * draw.uniform(0.98, 1.02) for each in own]
        lines.append(latency(row, own if row.subject == BASE else taken, [] if row.subject == BASE else own))
        lines.append(record(row, "memory", memory=memory(number)))
        lines.append(record(row, "energy", energy=energy(number)))
    path = folder / "made.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def memory(number: int) -> dict[str, Any]:
    peaks = {"allocated_peak_bytes": 3_000_000 + 10_000 * number, "reserved_peak_bytes": 8_000_000}
    return peaks | {"context_bytes": 2_500_000, "accounting_peak_bytes": "unavailable (accounting is off)"}


def energy(number: int) -> dict[str, Any]:
    if number % 5 == 4:
        return {"attribution": "unavailable (the counter went back)"}
    known = {"joules": 900.0, "joules_per_step": 0.3, "joules_per_token": 0.01 + number / 1e4, "window_seconds": 10.5}
    known |= {"joules_net": 500.0, "steps": 3000, "ticks": 104, "mean_watts": 85.0, "idle_watts": 40.0}
    return known | {
        "source": "counter",
        "attribution": "device",
        "validity": "verified" if number % 2 else "unverified: x",
    }


def comparison(folder: Path, change: float, pairs: int = 7, attempts: int = 1) -> Path:
    """A record of head, slower than base by `change`."""
    draw = random.Random(1)

    def seconds(times: float) -> list[float]:
        return [1e-3 * times * draw.uniform(1.0, 1.02) for _ in range(70)]

    def pair() -> dict[str, Any]:
        sides = {"base": seconds(1), "head": seconds(1 + change), "control": seconds(1)}
        return sides | {"interrupted": dict.fromkeys(sides, [False] * 70), "head_first": False, "throttled": False}

    workload = Workload("separate", "decode", "micro", "fp32", 4, 2, 8)
    limits = {"location": {"fail": 0.01, "accept": 0.03}, "tail": {"fail": 0.02, "accept": 0.1}}
    fields = {"limits": limits, "attempts": [{"pairs": [pair() for _ in range(pairs)], "quarantined": []}] * attempts}
    sides = {"base": {"name": "main"}, "head": {"name": HOSTILE}, "verdict": "FAIL", "because": "slower, and again"}
    path = folder / "ab.jsonl"
    path.write_text(json.dumps(record(Row(HOSTILE, workload), "ab", **fields, **sides)) + "\n")
    return path
