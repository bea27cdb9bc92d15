"""Arms: which adapters they are given, and what one step of each phase does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_bench.bench.arm import Arm, build_arm, draw_adapters, draw_tokens, make_step, relocate
from lora_bench.bench.workload import BASE, TARGETS, Workload
from lora_bench.definition import delta
from lora_bench.models.build import build
from lora_bench.reference import REFERENCE

SETUPS = ("base", "merged", "separate", "batched", "four_bit")


def workload_of(setup: str, phase: str) -> Workload:
    rank, adapters = int(setup != BASE) * 4, 3 if setup == "batched" else 1
    return Workload(setup, phase, "micro", "fp32", rank, batch=4, sequence=6, adapters=adapters)


def arm_of(workload: Workload) -> Arm:
    model = build("micro", dtype=torch.float32, device="cpu")
    return build_arm(model, None if workload.setup == BASE else REFERENCE, workload)


def shapes(module: nn.Module) -> list[torch.Size]:
    """The shape of every input that the module gets from now on."""
    seen: list[torch.Size] = []
    module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].shape))
    return seen


@pytest.mark.parametrize("setup", SETUPS)
def test_prefill_reads_all_tokens_at_once_and_needs_the_last_logits_only(setup: str) -> None:
    workload = workload_of(setup, "prefill")
    arm = arm_of(workload)
    step, seen = make_step(arm, workload), shapes(arm.model.model.layers[0].mlp)
    step.prepare()
    output: Any = step.run()

    assert seen == [(4, 6, 64)]
    assert output.logits.shape == (4, 1, 128)
    assert output.past_key_values.get_seq_length() == 6


@pytest.mark.parametrize("setup", SETUPS)
def test_decode_reads_one_token_of_each_sequence_after_the_same_cache_every_time(setup: str) -> None:
    workload = workload_of(setup, "decode")
    arm = arm_of(workload)
    step, seen = make_step(arm, workload), shapes(arm.model.model.layers[0].mlp)
    logits = []
    for _ in range(3):
        step.prepare()
        output: Any = step.run()
        logits.append(output.logits)
        assert output.past_key_values.get_seq_length() == 7

    assert seen == [(4, 1, 64)] * 3
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_decode_starts_from_the_same_cache_after_a_step_that_broke_off() -> None:
    workload = workload_of("base", "decode")
    arm = arm_of(workload)
    step = make_step(arm, workload)
    step.prepare()
    whole: Any = step.run()

    def broken(*_: object) -> None:
        raise RuntimeError("between the layers")

    hook = arm.model.model.layers[1].register_forward_pre_hook(broken)
    step.prepare()
    with pytest.raises(RuntimeError, match="between the layers"):
        step.run()
    hook.remove()
    step.prepare()
    lengths = [layer.get_seq_length() for layer in whole.past_key_values.layers]
    again: Any = step.run()

    assert lengths == [6, 6]
    assert torch.equal(again.logits, whole.logits)


def test_decode_goes_on_where_prefill_ended() -> None:
    arm = arm_of(workload_of("separate", "prefill"))
    tokens = draw_tokens(arm, 4, 7)
    step = make_step(arm, workload_of("separate", "decode"))
    step.prepare()
    output: Any = step.run()
    with torch.inference_mode():
        wanted = arm.model(tokens, logits_to_keep=1).logits

    # Each row's logits are nearest to those that one forward over all of its tokens gives.
    assert torch.cdist(output.logits[:, 0], wanted[:, 0]).argmin(1).tolist() == [0, 1, 2, 3]


def parameters(arm: Arm) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in arm.model.named_parameters()}


@pytest.mark.parametrize("setup", ["base", "separate"])
def test_a_training_step_updates_what_trains_and_leaves_no_gradient(setup: str) -> None:
    workload = workload_of(setup, "train")
    arm = arm_of(workload)
    step, before = make_step(arm, workload), parameters(arm)
    step.run()
    after = parameters(arm)
    changed = {name for name in before if not torch.equal(before[name], after[name])}

    assert arm.model.training
    assert all(parameter.grad is None for parameter in arm.model.parameters())
    adapters = {name for name in before if "lora_" in name}
    assert len(adapters) == (4 * len(TARGETS) if setup == "separate" else 0)
    assert changed == (adapters or set(before))


def test_adapters_are_the_same_in_every_run_and_different_in_every_layer_and_slot() -> None:
    workload = workload_of("batched", "prefill")
    linear = nn.Linear(64, 32)
    drawn = draw_adapters("a", linear, workload)

    for (spec, factors), (again, same) in zip(drawn, draw_adapters("a", linear, workload), strict=True):
        assert spec == again
        assert torch.equal(factors.a, same.a)
        assert torch.equal(factors.b, same.b)
    others = [factors for _, factors in (*drawn, *draw_adapters("b", linear, workload))]
    for index, factors in enumerate(others):
        assert not any(torch.equal(factors.a, other.a) or torch.equal(factors.b, other.b) for other in others[:index])
    assert len({spec.scaling for spec, _ in drawn}) == workload.adapters
    assert {spec.rank for spec, _ in drawn} == {4}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_adapter_s_output_is_about_as_large_as_its_base_s(dtype: torch.dtype) -> None:
    linear = nn.Linear(256, 512, bias=False, dtype=dtype)
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    base = x @ linear.weight.detach().double().T
    for spec, factors in draw_adapters("a", linear, workload_of("batched", "prefill")):
        assert factors.a.dtype == factors.b.dtype == dtype
        assert 0.5 < float(delta(x, factors, spec.scaling).std() / base.std()) < 2


def test_sequences_take_the_adapters_in_turn() -> None:
    ids = arm_of(workload_of("batched", "decode")).ids

    assert ids is not None
    assert ids.tolist() == [0, 1, 2, 0]


def test_tokens_are_the_same_in_every_run_and_of_the_vocabulary() -> None:
    arm = arm_of(workload_of("base", "prefill"))
    tokens = draw_tokens(arm, 50, 40)

    assert torch.equal(tokens, draw_tokens(arm, 50, 40))
    assert tokens.shape == (50, 40)
    assert tokens.unique().tolist() == list(range(128))


def test_what_is_merged_or_quantised_has_nothing_of_the_dense_pair_left() -> None:
    for setup, left in (
        ("merged", {"Linear"}),
        ("separate", {"LoraLinear"}),
        ("batched", {"Routed"}),
        ("four_bit", {"LoraLinear"}),
    ):
        arm = arm_of(workload_of(setup, "decode"))

        assert {type(layer).__name__ for layer in arm.layers.values()} == left
        assert len(arm.layers) == 2 * len(TARGETS)
        assert not arm.model.training


def test_a_step_s_weights_go_to_other_places_with_their_values() -> None:
    arm = arm_of(workload_of("separate", "decode"))
    parameters = dict(arm.model.named_parameters())
    places = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    make_step(arm, workload_of("separate", "decode")).relocate()

    assert dict(arm.model.named_parameters()) == parameters
    assert all(parameter.data_ptr() != places[name] for name, parameter in parameters.items())
    assert all(torch.equal(parameter, values[name]) for name, parameter in parameters.items())


def test_parameters_that_share_their_storage_stay_where_they_are() -> None:
    whole = torch.arange(8.0)
    model = nn.Module()
    model.first, model.second = nn.Parameter(whole[:4]), nn.Parameter(whole[4:])
    model.slice = nn.Parameter(torch.arange(9.0)[1:])
    relocate(model)
    whole.zero_()

    assert not model.first.any()
    assert not model.second.any()
    assert model.slice.storage_offset() == 1
