"""Probes of a real GPU: torch and NVML mean the same device, and what they count moves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_bench.bench import machine, nvml
from lora_bench.bench.clock import clock_of, wall_clock
from lora_bench.bench.clocks import Window, power_capped
from lora_bench.bench.doctor import examine
from lora_bench.bench.energy import measure_energy
from lora_bench.bench.meter import meter_of
from lora_bench.bench.nvml import Unavailable

SIDE, PRODUCTS = 2048, 40


def work(device: str) -> None:
    """Products of matrices, long enough for any clock, and the host does not wait for them."""
    a = torch.ones(SIDE, SIDE, device=device)
    for _ in range(PRODUCTS):
        a @ a


def finished(device: str) -> None:
    """The same, waited for."""
    work(device)
    if device != "cpu":
        torch.cuda.synchronize(device)


def test_nvml_knows_the_device_by_the_uuid_that_torch_tells(device: str) -> None:
    found = machine.fingerprint(device)
    memory = nvml.memory(machine.device_uuid(device))

    assert found["soft"]["uuid"] == machine.device_uuid(device)
    assert [name for name, value in found["hard"].items() if value in (None, "")] == []
    assert not isinstance(memory, Unavailable)
    assert memory.total == pytest.approx(torch.cuda.get_device_properties(device).total_memory, rel=0.05)


def test_events_tell_the_time_that_the_wall_clock_does(device: str) -> None:
    finished(device)
    by_events = [clock_of(device)(lambda: work(device)) for _ in range(5)]
    by_wall = [wall_clock(lambda: finished(device)) for _ in range(5)]

    # In seconds, and of all the work: a factor of a thousand, or of forty, would be seen.
    assert min(by_wall) / 3 < min(by_events) < 3 * min(by_wall)


def test_a_span_knows_its_clocks_and_how_long_the_power_limit_held_them_down(device: str) -> None:
    with Window(device) as window:
        finished(device)
    told = window.as_dict()

    assert len(window.clocks) == 2
    assert set(window.throttle_delta) | set(window.unavailable) >= set(nvml.THROTTLE_FIELDS.values())
    assert all(moved >= 0 for moved in window.throttle_delta.values())
    assert 0 <= power_capped(told) <= 1


def test_the_energy_counter_moves_while_the_device_works(device: str) -> None:
    meter = meter_of(device)
    if isinstance(meter, Unavailable):
        pytest.skip(str(meter))
    found = measure_energy(lambda: work(device), device=device, tokens=1, seconds=1.0, idle_seconds=1.0, meter=meter)

    assert not isinstance(found, Unavailable), found
    assert found.ticks > 0
    assert found.joules > 0
    assert 10 < found.mean_watts < 3000


def test_the_doctor_finds_the_device_and_what_reads_it(device: str, tmp_path: Path) -> None:
    findings = {finding.quantity: finding for finding in examine(device, tmp_path)}

    for quantity in ("GPU", "NVML", "device events", "memory by torch", "memory of the device"):
        assert findings[quantity].answer == "yes", findings[quantity]
