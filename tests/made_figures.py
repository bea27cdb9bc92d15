"""Figures of runs that never were, of one row, as a baseline compares them."""

from __future__ import annotations

import copy
from typing import Any

from lora_bench.bench.ratio import Interval
from lora_bench.bench.workload import Row, Workload
from lora_bench.gate.figures import Figures, Run, trouble

ROW = Row("mine", Workload("separate", "prefill", "micro", "fp32", rank=4, batch=2, sequence=8))
MIB = 2**20
OLD: dict[str, Any] = {
    "fingerprint": {"hard": {"device_name": "A", "torch": "2.13.0"}, "soft": {"os": "x"}},
    "memory": {
        "parameter_bytes": 100 * MIB,
        "allocated_peak_bytes": 200 * MIB,
        "saved_tensor_bytes": "unavailable (nothing is saved to infer)",
        "resident_peak_bytes": 300 * MIB,
        "attribution": "pid",
    },
    "ratio_to_base": {"median": 1.5, "low": 1.4, "high": 1.6},
    "seconds": [1.0, 2.0],
    "window": {"throttled": False},
}


def run(info: dict[str, Any], *rows: Row) -> Run:
    """A run with these figures in every row."""
    ratio = info["ratio_to_base"]
    why = trouble(info["seconds"], (), info["window"])
    interleaved = info.get("interleaved", True)
    figures = Figures(info["memory"], ratio and Interval(**ratio), why, interleaved=interleaved)
    return Run("old", info["fingerprint"], rows or (ROW,), dict.fromkeys(rows or (ROW,), figures))


def changed(path: str, value: object) -> dict[str, Any]:
    """A copy of OLD with another value at a dotted path."""
    info = copy.deepcopy(OLD)
    *parents, last = path.split(".")
    place = info
    for parent in parents:
        place = place[parent]
    place[last] = value
    return info


def ratio(median: float, low: float, high: float) -> dict[str, Any]:
    return changed("ratio_to_base", {"median": median, "low": low, "high": high})
