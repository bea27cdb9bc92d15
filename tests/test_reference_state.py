"""The reference layer copied, saved, loaded and cast."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_bench.case import Case, cases
from lora_bench.conformance.check import DENSE
from lora_bench.reference import LoraLinear
from lora_bench.spec import Factors
from tests.expected import exactly
from tests.reference_layers import base_of, each_dtype, made, of_kind, pickled

Copy = Callable[[LoraLinear], LoraLinear]


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@given(case=cases(), merged=st.booleans())
def test_a_copy_is_the_layer_and_shares_nothing(copied: Copy, case: Case, merged: bool) -> None:
    layer, problem, _ = made(case)
    unmerged = layer(problem.x)
    if merged:
        layer.merge()
    other = copied(layer)

    assert other.merged is merged
    assert torch.equal(other(problem.x), layer(problem.x))
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.zero_()
    other.unmerge()
    assert torch.equal(other(problem.x), unmerged)
    assert [name for name, p in other.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]


@each_dtype
@given(case=cases(dtype=st.just("fp32")), merged=st.booleans())
def test_a_layer_changes_dtype_as_a_whole(dtype: str, case: Case, merged: bool) -> None:
    layer, problem, _ = made(case)
    if merged:
        layer.merge()
    to = Case(dtype=dtype).torch_dtype
    deployed = layer.to(to).merge_and_unload()
    assert {parameter.dtype for parameter in deployed.parameters()} == {to}
    layer.unmerge()
    fresh = LoraLinear(base_of(problem).to(to), layer.spec)
    fresh.load(layer.factors)

    assert layer.lora_A.dtype == layer.lora_B.dtype == to
    assert torch.equal(layer(problem.x.to(to)), fresh(problem.x.to(to)))


@given(cases())
def test_the_state_is_that_of_the_base_and_two_factors(case: Case) -> None:
    layer, problem, factors = made(case)
    fresh = LoraLinear(base_of(problem), layer.spec)

    assert list(layer.adapter_state()) == ["lora_A", "lora_B"]
    assert torch.equal(layer.adapter_state()["lora_A"], factors.a)
    assert torch.equal(layer.adapter_state()["lora_B"], factors.b)
    assert not any(tensor.requires_grad for tensor in layer.adapter_state().values())
    assert fresh.load_state_dict(layer.adapter_state(), strict=False).unexpected_keys == []
    assert torch.equal(fresh(problem.x), layer(problem.x))
    assert set(layer.state_dict()) == {
        "lora_A",
        "lora_B",
        *(f"base_layer.{key}" for key in base_of(problem).state_dict()),
    }
    other = LoraLinear(nn.Linear(case.d_in, case.d_out, case.bias, dtype=case.torch_dtype), layer.spec)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(problem.x), layer(problem.x))


@pytest.mark.parametrize("merged", ["saving", "loading"])
def test_the_whole_state_of_a_merged_layer_is_neither_saved_nor_overwritten(merged: str) -> None:
    layer, (x, *_), _ = made(Case())
    other, *_ = made(Case(seed=1))
    (layer if merged == "saving" else other).merge()
    y = other(x)
    with pytest.raises(RuntimeError, match=rf"^unmerge before {merged} (the|a) whole layer: "):
        other.load_state_dict(layer.state_dict())

    assert torch.equal(other(x), y)


def test_values_that_the_dtype_cannot_hold_are_not_loaded() -> None:
    layer, _, factors = made(Case(dtype="fp16"))
    with pytest.raises(ValueError, match=exactly("torch.float16 cannot hold factor a: it has the value 1e+06")):
        layer.load(Factors(torch.full((2, 5), 1e6), torch.zeros(4, 2)))

    assert torch.equal(layer.lora_A, factors.a)


@pytest.mark.parametrize("kind", DENSE)
@given(data=st.data())
def test_a_state_read_back_and_a_copy_are_the_adapter(kind: str, data: st.DataObject) -> None:
    trial, layer = of_kind(case := data.draw(cases(kind, lora_bias=st.booleans())))
    fresh, y = trial.wrap(), layer(trial.x)
    state = layer.adapter_state()
    fresh.load_adapter_state(state)

    assert list(state) == ["lora_A", "lora_B", *["lora_bias"] * case.lora_bias]
    assert torch.equal(fresh(trial.x), y)
    assert all(own.data_ptr() != state[name].data_ptr() for name, own in fresh.adapter_state().items())
    assert all(parameter.requires_grad == ("base" not in name) for name, parameter in fresh.named_parameters())
    for copied in (copy.deepcopy(layer), pickled(layer)):
        assert torch.equal(copied(trial.x), y)
        for parameter in copied.parameters():
            nn.init.zeros_(parameter)
    assert torch.equal(layer(trial.x), y)
    wide = trial.x.double() if trial.x.is_floating_point() else trial.x
    assert layer.to(torch.float64)(wide).dtype == torch.float64


def test_a_state_that_is_another_s_is_refused_and_changes_nothing() -> None:
    layer, problem, _ = made(Case(dtype="fp16"))
    state, y = layer.adapter_state(), layer(problem.x)
    large = state["lora_B"].float()
    large[1, 0] = 1e6
    for wrong, message in (
        ({}, "this adapter's state is lora_A, lora_B, got nothing"),
        ({"lora_A": state["lora_A"]}, "this adapter's state is lora_A, lora_B, got lora_A"),
        (state | {"bias": state["lora_B"]}, "this adapter's state is lora_A, lora_B, got lora_A, lora_B, bias"),
        (state | {"lora_B": state["lora_B"].T}, "lora_B must be of shape (4, 2), got (2, 4)"),
        ({"lora_A": -state["lora_A"], "lora_B": large}, "torch.float16 cannot hold lora_B: it has the value 1e+06"),
    ):
        with pytest.raises(ValueError, match=exactly(message)):
            layer.load_adapter_state(wrong)
        assert torch.equal(layer(problem.x), y)
    layer.merge()
    with pytest.raises(
        RuntimeError, match=exactly("unmerge before loading another state: the merged weight holds the old one")
    ):
        layer.load_adapter_state(state)
