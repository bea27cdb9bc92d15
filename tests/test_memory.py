"""Peak memory: bytes that were counted by hand, a planted allocation, and probes that cannot be read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from torch import Tensor, nn

from lora_bench.bench import memory
from lora_bench.bench.arm import Arm, Step
from lora_bench.bench.isolate import stream
from lora_bench.models.bases import base_layer, missing
from lora_bench.models.routing import Routed, Router
from lora_bench.reference import REFERENCE, LoraLinear
from lora_bench.reference.batched import pool
from lora_bench.spec import Factors, LoraSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 2**20
PLANTED, PAGE = 200 * MIB, 4096


def arm_of(model: nn.Module) -> Arm:
    return Arm("base", cast("Any", model))


def test_a_weight_in_two_places_is_counted_once() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "head": nn.Linear(4, 8)})
    model["head"].weight = model["embed"].weight

    assert memory.parameter_bytes(model) == 4 * (8 * 4 + 8)


def test_buffers_are_counted_and_views_of_one_storage_once() -> None:
    model = nn.Linear(6, 2, bias=False, dtype=torch.float64)
    table = torch.zeros(10, dtype=torch.int16)
    model.register_buffer("table", table)
    model.register_buffer("part", table[2:5])

    assert memory.parameter_bytes(model) == 8 * 12 + 2 * 10


@pytest.mark.parametrize("kind", ["nf4", "linear4bit"])
def test_four_bit_layers_are_counted_with_their_statistics(kind: str) -> None:
    if reason := missing(kind):
        pytest.skip(reason)
    linear = nn.Linear(256, 128, bias=True)
    total = memory.parameter_bytes(base_layer(kind, linear))

    # Half a byte a weight, a byte for each block of 64, a float32 for each 256 of those, one offset, and the bias.
    values = 256 * 128
    least = values // 2 + values // 64 + 4 * (values // 64 // 256) + 4 + 4 * 128
    # bitsandbytes keeps its two code books (16 and 256 float32) with every layer.
    assert total - least in {"nf4": (0,), "linear4bit": (4 * 16 + 4 * 256,)}[kind]


@dataclass
class Example:
    """y = relu(x W1ᵀ) W2ᵀ without biases: x (5, 3), W1 (4, 3), W2 (2, 4)."""

    model: nn.Sequential
    x: Tensor

    def step(self) -> Step:
        return Step(lambda: self.model(self.x).sum().backward())


@pytest.fixture
def example() -> Example:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    return Example(model, torch.ones(5, 3))


def test_saved_tensors_are_what_the_chain_rule_needs(example: Example) -> None:
    # x for dW1 and relu(x W1ᵀ), once, for the relu and dW2; the sum needs sizes only, and W2 is a parameter.
    assert memory.saved_tensor_bytes(arm_of(example.model), example.step()) == 4 * (5 * 3 + 5 * 4)


def test_saved_tensors_of_a_frozen_first_layer_are_fewer(example: Example) -> None:
    example.model[0].requires_grad_(requires_grad=False)

    assert memory.saved_tensor_bytes(arm_of(example.model), example.step()) == 4 * 5 * 4


def test_what_is_saved_and_freed_within_a_step_counts_although_its_place_is_used_again(example: Example) -> None:
    def run() -> None:
        for _ in range(4):
            example.model(torch.ones(5, 3)).sum().backward()

    assert memory.saved_tensor_bytes(arm_of(example.model), Step(run)) == 4 * 4 * (5 * 3 + 5 * 4)


def test_a_saved_view_keeps_the_whole_of_its_storage(example: Example) -> None:
    example.x = torch.ones(50, 3)[10:15]

    assert memory.saved_tensor_bytes(arm_of(example.model), example.step()) == 4 * (50 * 3 + 5 * 4)


def test_a_step_under_no_grad_saves_nothing(example: Example) -> None:
    with torch.no_grad():
        assert memory.saved_tensor_bytes(arm_of(example.model), Step(lambda: example.model(example.x))) == 0


def allocate(when: str) -> Iterator[dict[str, Any]]:
    """Peaks of a step around an allocation of 200 MiB: in the step, before it, or never."""
    calls: list[int] = []
    kept: list[bytes] = []

    def run() -> None:
        calls.append(1)
        if when == "in every step" or (when == "in the warm-up" and len(calls) == 1):
            bytearray(PLANTED)[::PAGE] = bytes(PLANTED // PAGE)  # one byte a page makes it resident

    if when == "before":
        # In small blocks, of which the last stays: what malloc will not give back by itself.
        kept.append([bytes(2 * PAGE) for _ in range(PLANTED // (2 * PAGE))][-1])
    yield memory.peak_memory(arm_of(nn.Linear(2, 2)), Step(run), "cpu", train=False)


def resident(when: str) -> dict[str, Any]:
    (peaks,) = stream(allocate, when)
    assert isinstance(peaks, dict), peaks
    return peaks


def test_the_resident_peak_sees_what_the_step_allocates_and_nothing_before_it() -> None:
    idle, inside, warm, before = map(resident, ("never", "in every step", "in the warm-up", "before"))
    if not isinstance(idle["resident_peak_bytes"], int):
        pytest.skip(f"this kernel does not tell: {idle['resident_peak_bytes']}")
    grown = [peaks["resident_peak_bytes"] - idle["resident_peak_bytes"] for peaks in (inside, warm, before)]

    assert 0.9 * PLANTED <= grown[0] <= 1.2 * PLANTED
    assert max(abs(grown[1]), abs(grown[2])) <= 0.1 * PLANTED


def test_a_cpu_has_no_device_memory_and_inference_saves_nothing() -> None:
    peaks = memory.peak_memory(arm_of(nn.Linear(2, 2)), Step(lambda: None), "cpu", train=False)

    for name in memory.DEVICE_QUANTITIES:
        assert peaks[name] == "unavailable (the device is the CPU)"
    assert peaks["saved_tensor_bytes"] == "unavailable (nothing is saved to infer)"
    assert peaks["parameter_bytes"] == 4 * (2 * 2 + 2)
    assert peaks["attribution"] == "pid"


def test_the_first_call_warms_up_and_each_is_prepared() -> None:
    calls: list[str] = []
    step = Step(lambda: calls.append("run"), prepare=lambda: calls.append("prepare"))
    memory.peak_memory(arm_of(nn.Linear(2, 2)), step, "cpu", train=False)

    assert calls == ["prepare", "run", "prepare", "run"]


@pytest.mark.parametrize("name", ["CLEAR", "STATUS"])
def test_a_kernel_that_does_not_tell_makes_the_peak_unavailable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setattr(memory, name, tmp_path / "absent" / "file")
    peaks = memory.peak_memory(arm_of(nn.Linear(2, 2)), Step(lambda: None), "cpu", train=False)

    assert str(peaks["resident_peak_bytes"]).startswith("unavailable (the kernel's peak mark cannot be ")
    assert peaks["resident_peak_bytes"].endswith("No such file or directory)")
    assert peaks["parameter_bytes"] == 24


def test_a_status_without_the_mark_makes_the_peak_unavailable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\tpython\nVmRSS:\t12 kB\n")
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "clear")
    peaks = memory.peak_memory(arm_of(nn.Linear(2, 2)), Step(lambda: None), "cpu", train=False)

    assert peaks["resident_peak_bytes"] == "unavailable (/proc/self/status has no VmHWM)"
    assert (tmp_path / "clear").read_text() == "5"


def test_the_mark_is_read_in_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "status").write_text("VmPeak:\t  9 kB\nVmHWM:\t    12 kB\n")
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "clear")
    peaks = memory.peak_memory(arm_of(nn.Linear(2, 2)), Step(lambda: None), "cpu", train=False)

    assert peaks["resident_peak_bytes"] == 12 * 1024


def test_pooled_adapters_are_counted() -> None:
    layer = LoraLinear(nn.Linear(6, 4, bias=False), LoraSpec(2, 1.0))
    adapters = [(LoraSpec(2, 1.0), Factors(torch.zeros(2, 6), torch.zeros(4, 2))) for _ in range(3)]
    routed = Routed(layer, pool(layer, adapters), Router(REFERENCE, torch.device("cpu")))

    # The base, the layer's own A and B, and three adapters and an empty slot of the same rank.
    assert memory.parameter_bytes(routed) == 4 * (6 * 4 + (1 + 3 + 1) * 2 * (6 + 4))
