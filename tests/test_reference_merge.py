"""The reference layer merged, unmerged, deployed and switched off."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_bench import bounds, definition
from lora_bench.bounds import Arithmetic
from lora_bench.case import Case, cases
from lora_bench.reference import REFERENCE, LoraLinear, Nf4Linear
from lora_bench.spec import Factors
from tests.expected import exactly, within
from tests.reference_layers import base_of, made, obey


@given(cases())
def test_merged_is_unmerged_within_the_bounds(case: Case) -> None:
    layer, (x, w, bias, *_), factors = made(case)
    s, arithmetic, y = case.spec.scaling, Arithmetic.of(x.dtype), layer(x)
    layer.merge()
    assert layer.merged

    allowed = bounds.merged(x, w, bias, factors, s, arithmetic)
    assert within(layer(x), definition.forward(x, w, bias, factors, s), allowed)
    assert within(layer(x), y, allowed + bounds.separate(x, w, bias, factors, s, arithmetic))
    # The sum is made in float32 or wider, and rounded once.
    sum_, weight = definition.merged_weight(w, factors, s), REFERENCE.weight(layer) if REFERENCE.weight else w
    wide = bounds.merged_weight(w, factors, s, Arithmetic.of(torch.promote_types(x.dtype, torch.float32)))
    assert weight.dtype == w.dtype
    assert within(weight, sum_, wide + arithmetic.unit * (sum_.abs() + wide) + arithmetic.underflow)


@given(cases(), st.lists(st.booleans(), max_size=6), st.integers(0, 9))
def test_unmerging_restores_bit_for_bit(case: Case, verbs: list[bool], seed: int) -> None:
    layer, (x, w, *_), _ = made(case)
    y = layer(x)
    other = Case.parse(str(case).replace(f"s{case.seed}", f"s{seed}")).draw().adapters[0][1]
    for merge in verbs:
        if merge:
            layer.merge()
        else:
            layer.unmerge()
    layer.unmerge()

    assert not layer.merged
    assert torch.equal(layer.base_layer.weight, w)  # type: ignore[arg-type]
    assert torch.equal(layer(x), y)
    layer.merge()
    layer.unmerge()
    layer.load(other)
    layer.merge()
    fresh, *_ = made(case)
    fresh.load(other)
    fresh.merge()
    assert torch.equal(layer(x), fresh(x))


@given(cases())
def test_merging_twice_is_once(case: Case) -> None:
    layer, problem, _ = made(case)
    layer.merge()
    once = layer(problem.x)
    weight = layer.merged_weight()
    layer.merge()

    assert torch.equal(layer(problem.x), once)
    assert torch.equal(layer.merged_weight(), weight)
    assert torch.equal(weight, made(case)[0].merged_weight())


@given(cases(), st.booleans())
def test_what_is_deployed_is_the_merged_layer_alone(case: Case, merged: bool) -> None:
    layer, problem, _ = made(case)
    if merged:
        layer.merge()
    deployed = layer.merge_and_unload()
    assert layer.merged is merged
    layer.merge()

    assert type(deployed) is nn.Linear
    assert (deployed.in_features, deployed.out_features) == (case.d_in, case.d_out)
    assert torch.equal(deployed(problem.x), layer(problem.x))
    assert [name for name, _ in deployed.named_parameters()] == ["weight", "bias"][: 1 + case.bias]
    assert not any(parameter.requires_grad for parameter in deployed.parameters())
    theirs = {tensor.data_ptr() for tensor in (*layer.parameters(), *layer.buffers())}
    assert theirs.isdisjoint(parameter.data_ptr() for parameter in deployed.parameters())


@given(cases())
def test_switched_off_it_is_its_base(case: Case) -> None:
    layer, problem, _ = made(case)
    with_adapter, base = layer(problem.x), base_of(problem)(problem.x)
    for merge in (False, True):
        if merge:
            layer.merge()
        layer.enable(False)
        assert torch.equal(layer(problem.x), base)
        assert not layer.merged
        with pytest.raises(RuntimeError, match=exactly("enable the adapter before merging it")):
            layer.merge()
        layer.enable(True)
        assert torch.equal(layer(problem.x), with_adapter)


def test_what_would_go_wrong_in_silence_is_refused() -> None:
    layer, problem, factors = made(Case(rank=3))
    short = Factors(factors.a[:2], factors.b[:, :2])
    with pytest.raises(
        ValueError, match=exactly("factors must be a (3, 5) and b (4, 3) here, got a (2, 5) and b (4, 2)")
    ):
        layer.load(short)
    layer.merge()
    with pytest.raises(
        RuntimeError, match=exactly("unmerge before loading other factors: the merged weight holds the old ones")
    ):
        layer.load(factors)
    with pytest.raises(RuntimeError, match=exactly("unmerge before training: a merged adapter gets no gradient")):
        layer.train()
    assert layer.eval() is layer
    layer.unmerge()
    assert layer.train() is layer
    assert layer.training
    layer.load(factors)
    assert torch.equal(layer(problem.x), made(Case(rank=3))[0](problem.x))


def test_what_is_switched_off_is_not_deployed() -> None:
    layer, *_ = made(Case())
    layer.enable(False)

    with pytest.raises(RuntimeError, match=exactly("enable the adapter before merging it")):
        layer.merge_and_unload()


@given(cases(d_in=st.sampled_from([1, 7, 64, 128]), dtype=st.sampled_from(["fp32", "bf16", "fp16"])))
def test_over_a_4_bit_base_it_is_lora_on_what_that_holds(case: Case) -> None:
    problem = case.draw()
    base = Nf4Linear.from_linear(base_of(problem))
    held = {name: buffer.clone() for name, buffer in base.state_dict().items()}
    layer, factors, w = LoraLinear(base, case.spec), problem.adapters[0][1], base.dequantise()
    assert torch.equal(layer(problem.x), base(problem.x))
    layer.load(factors)
    obey(layer, problem, w)

    assert w.dtype == layer.lora_A.dtype == problem.x.dtype
    assert [name for name, parameter in layer.named_parameters() if parameter.requires_grad] == ["lora_A", "lora_B"]
    with pytest.raises(
        NotImplementedError, match=exactly("a 4-bit base cannot hold W + s B A; merge_and_unload gives a dense layer")
    ):
        layer.merge()
    deployed, given_ = layer.merge_and_unload(), (problem.x, w, problem.bias, factors, case.spec.scaling)
    assert type(deployed) is nn.Linear
    allowed = bounds.merged(*given_, Arithmetic.of(w.dtype))
    assert within(deployed(problem.x), definition.forward(*given_), allowed)
    assert all(torch.equal(held[name], buffer) for name, buffer in base.state_dict().items())
