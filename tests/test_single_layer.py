"""A single layer in the place of a model: proven and run in every set-up and phase, by ours and by PEFT."""

from __future__ import annotations

import pytest
import torch

from lora_bench.bench import ready
from lora_bench.bench.arm import make_step
from lora_bench.bench.memory import saved_tensor_bytes
from lora_bench.bench.proof import Wrong
from lora_bench.bench.scenario import reason_to_skip
from lora_bench.bench.workload import BASE, Row
from lora_bench.subject import Subject
from tests.micro_rows import row
from tests.planted_subjects import PLANTED

PLACES = [
    *((setup, phase) for setup in ("merged", "separate", "batched") for phase in ("prefill", "decode", "switch")),
    *(("four_bit", phase) for phase in ("prefill", "decode")),
    ("separate", "train"),
]


def of_layer(subject: str, setup: str, phase: str) -> Row:
    adapters = 2 if setup == "batched" else 1
    return row(subject, setup, phase, model="linear-64x128", batch=3, adapters=adapters)


@pytest.mark.parametrize(("setup", "phase"), PLACES)
@pytest.mark.parametrize("name", ["reference", "peft"])
def test_it_is_proven_and_run(name: str, setup: str, phase: str) -> None:
    own = of_layer(name, setup, phase)
    if reason := reason_to_skip(own, "cpu"):
        pytest.skip(reason)
    base = ready.build_base(own, "cpu")
    subject, arm = ready.build(base, own)
    step, proof = ready.ready_row(own, subject, arm)

    assert list(arm.layers) == ["linear"]
    assert proof is not None
    assert proof.error_ratio <= 1 < proof.visibility
    step.prepare()
    found = step.run()
    if phase in ("prefill", "decode"):
        assert isinstance(found, torch.Tensor)
        assert found.shape == (3, 1 if phase == "decode" else 6, 128)
        again = step.run()
        assert isinstance(again, torch.Tensor)
        assert torch.equal(found, again)


@pytest.mark.parametrize("phase", ["prefill", "decode", "train"])
def test_the_base_is_the_layer_itself(phase: str) -> None:
    own = of_layer("reference", "separate", phase).base()
    _, arm = ready.build(ready.build_base(own, "cpu"), own)
    before = [parameter.clone() for parameter in arm.model.parameters()]
    step, proof = ready.ready_row(own, None, arm)

    assert (own.subject, proof) == (BASE, None)
    assert torch.equal(before[0], next(arm.model.parameters())) == (phase != "train")
    if phase == "train":
        assert saved_tensor_bytes(arm, step) == 3 * 6 * 64 * 4


def test_a_training_step_moves_a_and_b_and_leaves_no_gradient_behind() -> None:
    own = of_layer("reference", "separate", "train")
    subject, arm = ready.build(ready.build_base(own, "cpu"), own)
    assert isinstance(subject, Subject)
    step = make_step(arm, own.workload)
    before = {name: parameter.clone() for name, parameter in arm.model.named_parameters()}
    seen: list[torch.Tensor] = []
    arm.model.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    step.run()
    moved = {name for name, parameter in arm.model.named_parameters() if not torch.equal(before[name], parameter)}

    assert moved == {name for name, parameter in arm.model.named_parameters() if parameter.requires_grad}
    assert len(moved) == 2
    assert seen[0].requires_grad
    assert all(tensor.grad is None for tensor in (*seen, *arm.model.parameters()))


def test_a_layer_that_is_not_lora_is_found_out() -> None:
    own = of_layer(f"{PLANTED}:DROPPED", "separate", "prefill")
    subject, arm = ready.build(ready.build_base(own, "cpu"), own)

    with pytest.raises(Wrong, match=r"^linear: found"):
        ready.ready_row(own, subject, arm)
