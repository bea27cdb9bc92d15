"""Peak memory on a real GPU: whose bytes NVML counts, and how far the budget is from torch's own peak."""

from __future__ import annotations

from typing import Any

import pytest

from lora_bench.bench import measure
from lora_bench.bench.fit import estimate, row_of
from lora_bench.bench.isolate import Failure, stream
from lora_bench.bench.workload import Row
from tests.micro_rows import row

WITHIN = 0.05
SEVEN_B: dict[str, Any] = {"model": "llama-2-7b", "dtype": "bf16", "rank": 16, "batch": 2, "sequence": 512}


def weighed(of: Row, device: str) -> dict[str, Any]:
    """The memory of a row, in a process of its own."""
    (_, last) = list(stream(measure.weigh, [of], device, seconds=600))
    assert not isinstance(last, Failure), last
    found: dict[str, Any] = last[1]
    return found


def test_nvml_counts_this_process_and_more_than_torch_has_reserved(device: str) -> None:
    memory = weighed(row("reference", "separate", "prefill"), device)
    if memory["attribution"] == "device-delta":
        pytest.skip(f"others use the device, and {memory['nvml_process_bytes']}")

    assert memory["attribution"] in ("pid", "sole-process", "accounting"), memory["nvml_process_bytes"]
    assert memory["context_bytes"] >= 0
    assert 0 < memory["allocated_peak_bytes"] <= memory["reserved_peak_bytes"] <= memory["nvml_process_bytes"]
    assert memory["nvml_device_delta_bytes"] >= memory["reserved_peak_bytes"]


@pytest.mark.parametrize("mode", ["lora", "qlora", "full"])
def test_the_budget_of_training_is_the_peak_that_torch_counts(device: str, mode: str) -> None:
    of = row_of(mode, "reference", "train", 1, **SEVEN_B)
    worked_out = estimate(of, mode, device).peak
    if worked_out > 0.9 * measure.free_bytes(device):
        pytest.skip(f"needs {worked_out:,} bytes of the device's memory")
    memory = weighed(of, device)

    assert memory["allocated_peak_bytes"] == pytest.approx(worked_out, rel=WITHIN)
