"""No timing without proof: the honest reference is not accused, and a proof leaves no trace."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_bench.bench import arm as arms
from lora_bench.bench import proof, ready
from lora_bench.bench.arm import build_arm
from lora_bench.bench.proof import Unproven, Wrong
from lora_bench.bench.result import Proof
from lora_bench.bounds import probable
from lora_bench.reference import REFERENCE
from lora_bench.spec import Factors, LoraSpec
from tests.proven_arms import ADAPTERS, COMPUTING, FIRST, LAYERS, arm_of, base_of, proven, row_of


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("setup", "phase", "checks"),
    [
        ("separate", "prefill", LAYERS),
        ("separate", "decode", LAYERS),
        ("separate", "train", 4 * LAYERS),
        ("merged", "prefill", 2 * LAYERS),  # the output and the weight
        ("merged", "decode", 2 * LAYERS),
        ("batched", "prefill", ADAPTERS * LAYERS),
        ("batched", "decode", ADAPTERS * LAYERS),
        ("four_bit", "prefill", LAYERS),
        ("four_bit", "decode", LAYERS),
    ],
)
def test_the_reference_is_right(setup: str, phase: str, checks: int, dtype: str) -> None:
    found = proven(REFERENCE, setup, phase, dtype)

    assert found.checks == checks
    assert found.error_ratio <= 1 < found.visibility


def test_a_subject_that_only_merges_in_place_is_right() -> None:
    subject = replace(REFERENCE, merge_and_unload=None)

    assert proven(subject, "merged", "prefill").checks == 2 * LAYERS


def test_a_merge_that_changes_nothing_is_none() -> None:
    subject = replace(REFERENCE, merge_and_unload=None, merge=lambda _layer: None)

    with pytest.raises(Wrong, match=r"the merged weight of model\.layers\.0\.self_attn\.q_proj: found"):
        proven(subject, "merged", "prefill")


def test_a_base_has_nothing_to_prove() -> None:
    row = row_of("separate", "prefill").base()

    step, found = ready.ready_row(row, None, build_arm(base_of("fp32"), None, row.workload))
    assert found is None
    assert step.run() is not None


def test_a_layer_that_never_runs_is_named() -> None:
    row = row_of("separate", "prefill")
    arm = arm_of(REFERENCE, row)
    arm.layers["model.unused"] = nn.Linear(2, 2)

    with pytest.raises(Wrong, match=r"^model\.unused was adapted but never ran$"):
        ready.ready_row(row, REFERENCE, arm)


@pytest.mark.parametrize("size", [0.0, 1e-9])
@pytest.mark.parametrize(("setup", "phase"), [("separate", "prefill"), ("merged", "decode"), ("separate", "train")])
def test_an_adapter_too_small_to_be_seen_is_inconclusive_and_never_right(
    monkeypatch: pytest.MonkeyPatch, setup: str, phase: str, size: float
) -> None:
    def faint(*arguments: Any) -> list[tuple[LoraSpec, Factors]]:
        return [(spec, Factors(factors.a, size * factors.b)) for spec, factors in draw_adapters(*arguments)]

    draw_adapters = arms.draw_adapters
    monkeypatch.setattr(arms, "draw_adapters", faint)

    with pytest.raises(Unproven, match=rf"^{FIRST}: the adapter's effect may be below .* \(visibility \S+\)$"):
        proven(REFERENCE, setup, phase)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 1), (16, 1), (4, 6), (8, 64), (16, 5), (5, 1000)])
def test_rows_are_taken_from_every_sequence_with_their_own_adapter(batch: int, tokens: int) -> None:
    x = torch.arange(batch * tokens).view(batch, tokens, 1)
    found = proof.sample_rows(x, -x, 100 * torch.arange(batch))

    assert len(found.x) == min(proof.ROWS, batch * tokens)
    assert torch.equal(found.y, -found.x)
    assert torch.equal(found.ids, 100 * (found.x[:, 0] // tokens))
    assert set(found.ids.tolist()) == set(range(0, 100 * batch, 100))


@pytest.mark.parametrize("phase", COMPUTING)
def test_a_proof_leaves_the_model_as_it_was(phase: str) -> None:
    row = row_of("separate", phase)
    arm = arm_of(REFERENCE, row)
    before = {name: tensor.clone() for name, tensor in arm.model.state_dict().items()}
    if phase == "train":
        proof.prove_training(arm, REFERENCE)
    else:
        proof.prove(arm, arms.make_step(arm, row.workload))

    assert all(parameter.grad is None for parameter in arm.model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in arm.model.state_dict().items())
    for layer in arm.layers.values():
        assert not layer._forward_hooks
        assert not layer._backward_hooks


def nothing(x: Tensor, *_: object) -> Tensor:
    return torch.zeros((), dtype=torch.float64)


def test_a_merged_layer_is_judged_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probable, "merged", nothing)

    with pytest.raises(Wrong, match=r"allowed 0\.00e\+00 \(xinf\)"):
        proven(REFERENCE, "merged", "prefill")
    assert proven(REFERENCE, "separate", "prefill").checks == LAYERS


def test_a_separate_layer_may_add_the_product_to_its_weight_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probable, "separate", nothing)

    assert proven(REFERENCE, "separate", "prefill").checks == LAYERS
    assert proven(REFERENCE, "merged", "prefill").checks == 2 * LAYERS
    monkeypatch.setattr(probable, "merged", nothing)
    with pytest.raises(Wrong, match=r"allowed 0\.00e\+00 \(xinf\)"):
        proven(REFERENCE, "separate", "prefill")


def test_many_proofs_are_told_by_the_worst() -> None:
    assert proof.summary([Proof(2, 0.25, 9.0), Proof(3, 0.75, 5.0), Proof(1, 0.5, 7.0)]) == Proof(6, 0.75, 5.0)


def test_the_layers_of_a_large_batch_see_every_adapter_between_them() -> None:
    x, y, ids = torch.zeros(40, 2), torch.zeros(40, 3), torch.arange(40)
    seen = [set(proof.sample_rows(x, y, ids, shift).ids.tolist()) for shift in (0, 1, 2)]

    assert [len(adapters) for adapters in seen] == [16, 16, 16]
    assert set.union(*seen) == set(range(40))
