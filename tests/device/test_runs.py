"""Whole runs on a real GPU: graphs, 4-bit weights, the suites measured and unmeasured, and a gate's worker."""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lora_bench.bench.arm import build_arm, make_step
from lora_bench.bench.brackets import bracketed
from lora_bench.bench.clock import clock_of
from lora_bench.bench.launches import ROUNDS, look
from lora_bench.bench.ready import build_base
from lora_bench.bench.records import read
from lora_bench.bench.result import recorded
from lora_bench.bench.turns import Refusal, Timing
from lora_bench.bench.workload import BASE, Row
from lora_bench.gate.workers import Server, Turns
from lora_bench.reference import REFERENCE, Nf4Linear
from lora_bench.reference.nf4 import quantise
from tests.micro_rows import row
from tests.pytest_runs import GPU, ROOT, python

if TYPE_CHECKING:
    from lora_bench.bench.arm import Step

SETUPS = ("batched", BASE, "merged", "separate", "four_bit")
"""The one that cannot be captured first: it must not spoil the others."""
SERVED = {"adapters": 2, "batch": 4, "sequence": 16, "dtype": "bf16"}


def own_row(setup: str, phase: str) -> Row:
    changes = SERVED if setup == "batched" else SERVED | {"adapters": 1}
    of = row("reference", setup if setup != BASE else "separate", phase, **changes)
    return of if setup != BASE else of.base()


def steps_on(device: str, phase: str) -> dict[Row, Step]:
    steps = {}
    for setup in SETUPS:
        of = own_row(setup, phase)
        arm = build_arm(build_base(of, device), None if setup == BASE else REFERENCE, of.workload)
        steps[of] = make_step(arm, of.workload)
        steps[of].prepare()
        steps[of].run()
    return steps


def test_a_replayed_graph_computes_the_decode_step_and_every_step_is_taken_cold(device: str) -> None:
    steps = steps_on(device, "decode") | steps_on(device, "prefill")
    hot = {}
    for of, step in steps.items():
        step.prepare()
        hot[of] = [clock_of(device)(step.run)]
    found = dict(look(steps, hot, device, budget_seconds=1.0, holding=lambda _: None))

    assert found.keys() == steps.keys()
    captured = {of.workload.setup: told["graph_seconds"] for of, told in found.items() if of.workload.phase == "decode"}
    assert captured.pop("batched").startswith("unavailable (it cannot be captured: RuntimeError: ")
    assert {setup: len(seconds) for setup, seconds in captured.items()} == dict.fromkeys(captured, ROUNDS)
    for told in found.values():
        assert statistics.median(told["cold_seconds"]) > 0
        assert min(told["device_seconds"]) > 0
        assert 0 <= told["launch_share"] < 1


def test_four_bit_weights_are_dequantised_as_on_a_cpu_to_the_bit(device: str) -> None:
    nf4 = quantise(torch.randn(128, 320, generator=torch.Generator().manual_seed(0)))

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        here, there = Nf4Linear(nf4, dtype=dtype), Nf4Linear(nf4, dtype=dtype).to(device)
        assert torch.equal(there.dequantise().cpu(), here.dequantise())


def test_the_suites_are_measured_with_every_row(device: str, tmp_path: Path) -> None:
    size = ("--lora-model=micro", "--lora-seconds=1", f"--lora-output={tmp_path}")
    run = python("-m", "pytest", GPU, "--benchmark", f"--lora-device={device}", *size)

    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = tmp_path.glob("*.jsonl")
    records = read(path)
    planned = next(record["rows"] for record in records if record["quantity"] == "plan")
    results = recorded(records)
    assert len(results) >= len(planned)
    for result in results.values():
        assert result.measured, result.failure
        assert isinstance(result.memory["parameter_bytes"], int), result.memory
        assert bool(result.launches) is device.startswith("cuda")


@pytest.mark.parametrize("model", ["micro", "linear-4096x11008"])
def test_the_suites_hold_unmeasured(device: str, model: str) -> None:
    run = python("-m", "pytest", GPU, f"--lora-device={device}", f"--lora-model={model}", "--lora-sequence=16")

    assert run.returncode == 0, run.stdout + run.stderr


def test_models_alone_on_the_device_are_proven_by_weights_that_wait_on_the_host(device: str) -> None:
    phases = {"separate": ("prefill", "train"), "merged": ("decode", "switch"), "four_bit": ("decode",)}
    for setup, own in phases.items():
        for phase in own:
            of = row("reference", setup, phase)
            host = build_base(of, device).to("cpu")
            messages = list(bracketed([of.base(), of], host, device, 0.5, lambda _: None))
            timings = {each.row: each for each in messages if isinstance(each, Timing)}

            assert not [each for each in messages if isinstance(each, Refusal)]
            assert timings[of].proof is not None
            assert set(timings[of].base.turns) == {0, 2}


def test_a_gate_s_workers_take_turns_on_the_device(device: str) -> None:
    of = row("reference", "separate", "decode")
    task: dict[str, Any] = {"subject": of.subject, "workload": of.workload.as_dict(), "device": device}
    with Server("base", [sys.executable, "-P"], os.environ | {"PYTHONPATH": str(ROOT)}) as server:
        workers = {name: server.start(task) for name in ("base", "head", "control")}
        told = [worker.ready() for worker in workers.values()]
        turns = Turns(workers, seed=0)
        turns.run(20)
        pair = turns.pair("head")
        for worker in workers.values():
            worker.close()

    assert [each["fingerprint"]["hard"]["device"] for each in told] == ["cpu" if device == "cpu" else "cuda"] * 3
    assert len(pair.head) == 20
    assert min(*pair.base, *pair.head, *pair.control) > 0
