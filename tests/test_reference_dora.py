"""The reference's DoRA: a layer that starts as its base, obeys the definition, and refuses what it cannot do."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_bench import dora
from lora_bench.bounds import Arithmetic
from lora_bench.case import Case, Problem, cases
from lora_bench.reference.dora import DoraLinear
from lora_bench.reference.four_bit import Nf4Linear
from lora_bench.reference.several import activate, add, combine
from lora_bench.spec import Factors, LoraSpec
from tests.expected import within
from tests.reference_layers import base_of, each_dtype

CASE = Case(tokens=4, d_in=6, d_out=5, rank=3, alpha=4.5, bias=True, dora=True)


def fresh(case: Case, dropout: float = 0.0) -> tuple[DoraLinear, Problem, Factors]:
    problem = case.draw()
    spec = LoraSpec(case.rank, case.alpha, dropout, case.rslora, dora=True)
    return DoraLinear(base_of(problem), spec), problem, problem.adapters[0][1]


def loaded(case: Case, dropout: float = 0.0) -> tuple[DoraLinear, Problem, Factors]:
    layer, problem, factors = fresh(case, dropout)
    layer.load(factors)
    return layer, problem, factors


@each_dtype
@given(data=st.data())
def test_output_gradients_and_merge_are_those_of_the_definition(dtype: str, data: st.DataObject) -> None:
    case = data.draw(cases(dtype=st.just(dtype), dora=st.just(True)))
    layer, problem, factors = loaded(case)
    (x, weight, bias, grad, *_), s, arithmetic = problem, case.spec.scaling, Arithmetic.of(case.torch_dtype)
    terms, rows = (x, weight, bias, factors, s), x.clone().requires_grad_()
    y = layer(rows)
    y.backward(grad)
    wanted = dora.forward(*terms)
    assert y.dtype == x.dtype
    assert within(y.detach(), wanted, dora.separate_bound(*terms, arithmetic))

    slopes = dora.gradients(x, grad, weight, factors, s)
    allowed = dora.gradient_bounds(x, grad, weight, factors, s, arithmetic, bias=bias)
    live = layer.lora_A, layer.lora_B, rows, layer.lora_magnitude_vector
    for leaf, slope, limit in zip(live, slopes, allowed, strict=True):
        assert leaf.grad is not None
        assert within(leaf.grad, slope, limit)

    unloaded = layer.merge_and_unload()
    layer.eval().merge()
    merged = dora.merged_weight(weight, factors, s), dora.merged_weight_bound(weight, factors, s, arithmetic)
    assert within(layer.base_weight(), *merged)
    assert within(layer(x), wanted, dora.merged_bound(*terms, arithmetic))
    assert torch.equal(unloaded(x), layer(x))
    layer.unmerge()
    assert torch.equal(layer.base_weight(), weight)
    assert torch.equal(layer(x), y)


@each_dtype
@given(data=st.data())
def test_a_fresh_layer_is_its_base_bit_for_bit(dtype: str, data: st.DataObject) -> None:
    case = data.draw(cases(dtype=st.just(dtype)))
    layer, problem, _ = fresh(case)
    adapter = Factors(layer.lora_A.detach(), layer.lora_B.detach())
    terms = problem.weight, adapter, case.spec.scaling

    assert torch.equal(layer(problem.x), layer.base_layer(problem.x))
    assert torch.equal(layer.merged_weight(), problem.weight)
    assert within(
        layer.lora_magnitude_vector.detach(),
        dora.norms(*terms),
        dora.norm_bound(*terms, Arithmetic.of(case.torch_dtype)),
    )


def test_a_b_and_the_magnitude_train_and_nothing_else() -> None:
    layer, problem, _ = loaded(CASE)
    trainable = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trainable == {"lora_A", "lora_B", "lora_magnitude_vector"}
    assert sum(map(torch.numel, (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector))) == layer.spec.parameters(
        6, 5
    )

    before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    optimiser = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(problem.x).square().sum().backward()
    optimiser.step()
    moved = {name for name, parameter in layer.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == trainable


def test_dropout_acts_on_the_adapters_input_alone() -> None:
    layer, problem, factors = loaded(CASE, dropout=0.5)
    without = Factors(factors.a, torch.zeros_like(factors.b), magnitude=factors.magnitude)
    layer.train()
    assert not torch.equal(layer(problem.x), layer(problem.x))
    assert torch.equal(layer.eval()(problem.x), loaded(CASE)[0](problem.x))

    layer.load(without)
    assert torch.equal(layer.train()(problem.x), layer.eval()(problem.x))


def test_state_and_factors_hold_the_magnitude() -> None:
    layer, problem, factors = loaded(CASE)
    other, *_ = fresh(CASE)
    y = layer(problem.x)
    twin = copy.deepcopy(layer)
    other.load_adapter_state(layer.adapter_state())

    assert list(layer.adapter_state()) == ["lora_A", "lora_B", "lora_magnitude_vector"]
    assert layer.factors.magnitude is layer.lora_magnitude_vector
    assert torch.equal(other(problem.x), y)
    layer.load(Factors(factors.a, factors.b, magnitude=2 * layer.lora_magnitude_vector.detach()))
    assert torch.equal(twin(problem.x), y)
    assert not torch.equal(layer(problem.x), y)
    with pytest.raises(ValueError, match="factors must have a magnitude, as dora=True says"):
        layer.load(Factors(factors.a, factors.b))
    with pytest.raises(ValueError, match="this adapter's state is lora_A, lora_B, lora_magnitude_vector, got lora_A"):
        layer.load_adapter_state({"lora_A": factors.a})


def test_off_is_the_base_merged_or_not() -> None:
    layer, problem, _ = loaded(CASE)
    layer.eval().merge()
    layer.enable(False)
    assert torch.equal(layer.base_weight(), problem.weight)
    assert torch.equal(layer(problem.x), layer.base_layer(problem.x))

    layer.enable(True)
    activate(layer, [])
    assert torch.equal(layer(problem.x), layer.base_layer(problem.x))
    assert torch.equal(layer.merged_weight(), problem.weight)


def test_what_a_dora_cannot_do_is_refused() -> None:
    layer, _, factors = loaded(CASE)
    plain = Factors(factors.a, factors.b)
    spec = LoraSpec(CASE.rank, CASE.alpha)
    for refused in (
        lambda: layer.scale(0.5),
        lambda: layer.merge(factor=0.5),
        lambda: add(layer, "other", spec, plain),
        lambda: add(layer, "other", LoraSpec(CASE.rank, CASE.alpha, dora=True), factors),
        lambda: combine(layer, "sum", {"default": 1.0}, "cat"),
        lambda: DoraLinear(nn.Linear(6, 5), LoraSpec(2, 2.0, dora=True, lora_bias=True)),
    ):
        with pytest.raises(NotImplementedError, match="DoRA"):
            refused()
    assert not layer.merged
    assert not layer.further


def test_a_four_bit_base_is_judged_by_its_dequantised_weight() -> None:
    problem = Case(tokens=4, d_in=64, d_out=5, rank=3, dtype="fp32", bias=True, dora=True).draw()
    base, factors, spec = Nf4Linear.from_linear(base_of(problem)), problem.adapters[0][1], LoraSpec(3, 3.0, dora=True)
    layer = DoraLinear(base, spec)
    assert torch.equal(layer(problem.x), base(problem.x))

    layer.load(factors)
    terms = problem.x, base.dequantise(), problem.bias, factors, 1.0
    wanted, arithmetic = dora.forward(*terms), Arithmetic.of(torch.float32)
    assert within(layer(problem.x).detach(), wanted, dora.separate_bound(*terms, arithmetic))
    assert within(layer.merge_and_unload()(problem.x).detach(), wanted, dora.merged_bound(*terms, arithmetic))
    with pytest.raises(NotImplementedError, match="a 4-bit base cannot hold"):
        layer.eval().merge()


def test_an_output_whose_weights_are_all_zero_is_nan() -> None:
    base = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        base.weight[0] = 0
    y = DoraLinear(base, LoraSpec(1, 1.0, dora=True))(torch.ones(1, 3))

    assert y[0, 0].isnan()
    assert torch.equal(y[0, 1], base(torch.ones(1, 3))[0, 1])
