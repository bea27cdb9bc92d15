"""The reference in attention: the definition, merged or not, and what it refuses."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_bench import attention, bounds, definition
from lora_bench.attention import Adapted
from lora_bench.bounds import Arithmetic
from lora_bench.reference.attention import LoraAttention
from lora_bench.spec import LoraSpec
from tests.attention_trials import Trial, base_of, brief, drawn, each_dtype, factors_of, ratio, ratios, trials
from tests.expected import exactly


def made(seed: int = 0, batch_first: bool = True, dtype: str = "fp64") -> tuple[LoraAttention, Trial]:
    trial = drawn(dtype=dtype, seed=seed, source=3)
    layer = LoraAttention(base_of(trial.layer, batch_first), LoraSpec(rank=2, alpha=3.0))
    layer.load(factors_of(trial.layer))
    return layer, trial


@each_dtype
@pytest.mark.parametrize("training", [True, False])
@brief
@given(data=st.data())
def test_the_layer_is_the_definition(dtype: str, training: bool, data: st.DataObject) -> None:
    inputs, layer, grad = data.draw(trials(dtype))
    spec = LoraSpec(layer.in_proj.factors.rank, layer.in_proj.scaling * layer.in_proj.factors.rank)
    lora = LoraAttention(base_of(layer), spec).train(training)
    lora.load(factors_of(layer))
    arithmetic, given_ = Arithmetic.of(grad.dtype), {"attn_mask": inputs.mask}
    found = lora(*inputs[:3], **given_)
    assert max(ratios(found, attention.forward(inputs, layer), attention.merged_bound(inputs, layer, arithmetic))) <= 1

    found[0].backward(grad)
    leaves = [own for pair in lora.factors for own in (pair.a, pair.b)]
    wanted, allowed = (
        attention.gradients(inputs, grad, layer),
        attention.gradient_bounds(inputs, grad, layer, arithmetic),
    )
    for leaf, slope, limit in zip(leaves, wanted[:4], allowed[:4], strict=True):
        assert leaf.grad is not None
        assert ratio(leaf.grad, slope, limit) <= 1
    assert all(parameter.grad is None for parameter in lora.base_layer.parameters())


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_a_new_layer_is_its_base_bit_for_bit(batch_first: bool, need_weights: bool) -> None:
    inputs, layer, _ = drawn(source=3)
    base = base_of(layer, batch_first)
    called = [own if batch_first else own.transpose(0, 1) for own in inputs[:3]]
    y, weights = base(*called, need_weights=need_weights, average_attn_weights=False)
    lora = LoraAttention(base, LoraSpec(2, 3.0))
    found, found_weights = lora(*called, need_weights=need_weights, average_attn_weights=False)

    assert lora.in_proj.lora_A.any()
    assert torch.equal(found, y)
    assert torch.equal(found_weights, weights) if need_weights else found_weights is None
    assert {name for name, own in lora.named_parameters() if own.requires_grad} == set(lora.adapter_state())


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_first_dimension_may_be_the_length(batch_first: bool) -> None:
    lora, (inputs, layer, _) = made(batch_first=batch_first)
    called = [own if batch_first else own.transpose(0, 1) for own in inputs[:3]]
    y = lora(*called)[0]

    allowed = attention.bound(inputs, layer, Arithmetic.of(y.dtype)).output
    assert ratio(y if batch_first else y.transpose(0, 1), attention.forward(inputs, layer).output, allowed) <= 1


@each_dtype
@torch.no_grad()  # torch has other kernels for weights of which nothing is to be trained
def test_merged_is_unmerged_and_unmerging_restores_bit_for_bit(dtype: str) -> None:
    lora, (inputs, layer, _) = made(dtype=dtype)
    before, state = lora(*inputs[:3]), copy.deepcopy(lora.base_layer.state_dict())
    lora.merge()
    once = lora.base_layer.in_proj_weight.clone()
    lora.merge()
    assert torch.equal(lora.base_layer.in_proj_weight, once)
    assert not torch.equal(once, layer.in_proj.weight)
    for found, wanted in zip(lora(*inputs[:3]), before, strict=True):
        assert torch.equal(found, wanted)

    unloaded = lora.merge_and_unload()
    lora.unmerge()
    assert not lora.merged
    assert all(torch.equal(own, state[name]) for name, own in lora.base_layer.state_dict().items())
    for plain_ in (unloaded, lora.merge_and_unload()):
        assert type(plain_) is nn.MultiheadAttention
        assert torch.equal(plain_(*inputs[:3])[0], before[0])
        assert not any(parameter.requires_grad for parameter in plain_.parameters())
    for weight, part in ((once, layer.in_proj), (unloaded.out_proj.weight, layer.out_proj)):
        sum_ = definition.merged_weight(part.weight, part.factors, part.scaling)
        # Summed in float32 or wider, and rounded once.
        own, far = (Arithmetic.of(of) for of in (weight.dtype, torch.promote_types(weight.dtype, torch.float32)))
        wide = bounds.merged_weight(part.weight, part.factors, part.scaling, far)
        assert ratio(weight, sum_, wide + own.unit * (sum_.abs() + wide) + own.underflow) <= 1


@pytest.mark.parametrize("merged", [True, False])
@torch.no_grad()
def test_off_is_the_base(merged: bool) -> None:
    lora, (inputs, layer, _) = made()
    if merged:
        lora.merge()
    on, frozen = lora(*inputs[:3])[0], base_of(layer).requires_grad_(False)
    lora.enable(False)
    assert torch.equal(lora(*inputs[:3])[0], frozen(*inputs[:3])[0])
    lora.enable(True)
    assert torch.equal(lora(*inputs[:3])[0], on)


@torch.no_grad()
def test_its_state_goes_into_another_layer_and_copies_stand_alone() -> None:
    lora, (inputs, layer, _) = made()
    other = LoraAttention(base_of(layer), LoraSpec(2, 3.0))
    other.load_adapter_state(lora.adapter_state())
    lora.merge()
    copies = [other, copy.deepcopy(lora), pickle.loads(pickle.dumps(lora))]  # noqa: S301  # our own
    y = lora(*inputs[:3])[0]
    lora.unmerge()
    lora.load(tuple(own.map(torch.zeros_like) for own in lora.factors))  # type: ignore[arg-type]

    assert not torch.equal(lora(*inputs[:3])[0], y)
    assert all(torch.equal(each(*inputs[:3])[0], y) for each in copies)


def test_what_cannot_be_done_is_refused() -> None:
    lora, (_, layer, _) = made()
    into, out = factors_of(layer)
    with pytest.raises(
        ValueError, match=exactly("factors must be a (2, 4) and b (12, 2) here, got a (2, 4) and b (4, 2)")
    ):
        lora.load((out, out))
    with pytest.raises(
        ValueError, match=exactly("factors must be a (2, 4) and b (4, 2) here, got a (2, 4) and b (12, 2)")
    ):
        lora.load((into, into))
    names = "in_proj.lora_A, in_proj.lora_B, out_proj.lora_A, out_proj.lora_B"
    with pytest.raises(ValueError, match=exactly(f"this adapter's state is {names}, got nothing")):
        lora.load_adapter_state({})
    lora.enable(False)
    for verb in (lora.merge, lora.merge_and_unload):
        with pytest.raises(RuntimeError, match=exactly("enable the adapter before merging it")):
            verb()
    lora.enable(True)
    lora.merge()
    later: list[Callable[[], object]] = [lambda: lora.load((into, out)), lora.train, lora.state_dict]
    later += [lambda: lora.load_adapter_state(lora.adapter_state()), lambda: lora.load_state_dict({})]
    for late in later:
        with pytest.raises(RuntimeError, match=r"^unmerge before "):
            late()


def test_what_it_does_not_offer_is_refused() -> None:
    base, sizes = base_of(drawn().layer), nn.MultiheadAttention(4, 2, kdim=3)
    for spec in (LoraSpec(2, 3.0, dropout=0.1), LoraSpec(2, 3.0, dora=True), LoraSpec(2, 3.0, lora_bias=True)):
        message = exactly(f"dropout, DoRA and lora_bias are not offered here, got {spec}")
        with pytest.raises(NotImplementedError, match=message):
            LoraAttention(base, spec)
    with pytest.raises(
        NotImplementedError, match=exactly("query, key and value of different sizes have no in_proj to adapt")
    ):
        LoraAttention(sizes, LoraSpec(2, 3.0))
    with pytest.raises(TypeError, match=exactly("LoraAttention wraps an nn.MultiheadAttention, got a Linear")):
        LoraAttention(nn.Linear(2, 2), LoraSpec(2, 3.0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=exactly("query, key and value must be of one size, got 4, 3, 4")):
        Adapted.of(sizes, factors_of(drawn().layer), 1.0)
