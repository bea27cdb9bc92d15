"""The reference layer: LoRA by its definition, exactly where exactness can be had and within the bounds elsewhere."""

import copy
import math

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from lora_bench.bounds import Arithmetic
from lora_bench.case import Case, cases
from lora_bench.reference import LoraLinear
from lora_bench.spec import Factors, LoraSpec
from tests.expected import exactly, within
from tests.reference_layers import base_of, each_dtype, made, obey


@given(cases())
def test_a_new_layer_is_its_base_bit_for_bit(case: Case) -> None:
    problem = case.draw()
    base = base_of(problem)
    y = base(problem.x)
    layer = LoraLinear(base, LoraSpec(case.rank, case.alpha, dropout=0.5))

    assert layer.lora_A.any()
    assert torch.equal(layer(problem.x), y)
    assert torch.equal(layer.eval()(problem.x), y)
    layer.merge()
    assert torch.equal(layer(problem.x), y)


@given(cases())
def test_output_and_gradients_are_those_of_the_definition(case: Case) -> None:
    layer, problem, _ = made(case)
    x, y = problem.x.clone(), layer(problem.x)
    obey(layer, problem, problem.weight)

    assert torch.equal(problem.x, x)
    assert layer(x[None, None]).shape == (1, 1, *y.shape)
    assert layer(x[0]).shape == y[0].shape
    assert layer(x[:0]).shape == (0, case.d_out)


@given(cases())
def test_only_r_times_d_and_k_parameters_train(case: Case) -> None:
    layer = made(case)[0]
    trained = {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}

    assert list(trained) == ["lora_A", "lora_B"]
    assert trained["lora_A"].shape == (case.rank, case.d_in)
    assert trained["lora_B"].shape == (case.d_out, case.rank)
    assert sum(map(torch.numel, trained.values())) == case.spec.parameters(case.d_in, case.d_out)
    assert layer.factors.a is layer.lora_A
    assert layer.factors.b is layer.lora_B


@pytest.mark.parametrize("rslora", [False, True])
def test_gradients_are_differences(rslora: bool) -> None:
    layer, problem, factors = made(Case(rslora=rslora, bias=True))

    def forward(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"lora_A": a, "lora_B": b}, (x,))

    inputs = tuple(tensor.clone().requires_grad_() for tensor in (problem.x, factors.a, factors.b))
    assert torch.autograd.gradcheck(forward, inputs)


@each_dtype
def test_at_the_start_b_learns_first(dtype: str) -> None:
    problem = Case(tokens=8, dtype=dtype).draw()
    layer = LoraLinear(base_of(problem), LoraSpec(2, 4))
    layer(problem.x).sum().backward()

    assert layer.lora_A.grad is not None
    assert layer.lora_B.grad is not None
    assert not layer.lora_A.grad.any()
    assert layer.lora_B.grad.all()


@each_dtype
@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.AdamW])
def test_training_leaves_the_base_alone(dtype: str, optimiser: type[torch.optim.SGD | torch.optim.AdamW]) -> None:
    layer, problem, factors = made(Case(dtype=dtype, bias=True))
    steps = optimiser(layer.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        steps.zero_grad()
        layer(problem.x).square().sum().backward()
        steps.step()

    kept = base_of(problem).state_dict()
    assert all(torch.equal(kept[key], value) for key, value in layer.base_layer.state_dict().items())
    assert not torch.equal(layer.lora_A, factors.a)
    assert not torch.equal(layer.lora_B, factors.b)


@each_dtype
def test_dropout_is_on_the_adapters_path_and_in_training_only(dtype: str) -> None:
    case = Case(tokens=50, d_in=30, bias=True, dtype=dtype)
    layer, (x, *_), factors = made(case, dropout=0.5)
    plain = made(case)[0]

    assert torch.equal(layer.eval()(x), plain(x))
    torch.manual_seed(0)
    assert not torch.equal(layer.train()(x), layer(x))
    layer.load(Factors(factors.a, torch.zeros_like(factors.b)))
    assert torch.equal(layer(x), plain.base_layer(x))


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean(dropout: float) -> None:
    case, draws, doubt = Case(tokens=1, d_in=6), 40_000, 1e-9
    layer, problem, _ = made(case, dropout)
    layer.load(Factors(torch.ones_like(layer.lora_A), torch.ones_like(layer.lora_B)))
    torch.manual_seed(0)
    x = problem.x.abs()
    mean = layer(x.expand(draws, -1)).mean(0)

    wanted, added = made(case)[0].base_layer(x)[0], layer.spec.scaling * case.rank * x.sum()
    # Hoeffding: a draw lies between nothing added and all of it over 1 - dropout.
    allowed = added / (1 - dropout) * math.sqrt(math.log(2 / doubt) / (2 * draws))
    assert within(mean, wanted + added, allowed)
    assert not within(wanted + (1 - dropout) * added, wanted + added, 2 * allowed)  # as without the division


@each_dtype
def test_a_starts_as_the_weight_of_a_linear_layer_does(dtype: str) -> None:
    torch.manual_seed(0)
    base, unit = (
        nn.Linear(64, 3, dtype=Case(dtype=dtype).torch_dtype),
        Arithmetic.of(Case(dtype=dtype).torch_dtype).unit,
    )
    one, two = (LoraLinear(copy.deepcopy(base), LoraSpec(400, 1)) for _ in range(2))
    a, limit = one.lora_A.double(), 1 / 8

    assert one.lora_A.dtype == one.lora_B.dtype == base.weight.dtype
    assert not torch.equal(one.lora_A, two.lora_A)
    assert a.abs().max() <= limit
    # Hoeffding, for 25,600 numbers in [-1/8, 1/8] and their squares in [0, 1/64], and a doubt of 1e-9.
    allowed = math.sqrt(math.log(2 / 1e-9) / (2 * a.numel()))
    assert abs(a.mean()) <= 2 * limit * allowed + limit * unit
    assert abs((a**2).mean() - limit**2 / 3) <= limit**2 * (allowed + 2 * unit)


def test_a_layer_is_where_its_base_is() -> None:
    layer = LoraLinear(nn.Linear(7, 5, device="meta", dtype=torch.bfloat16), LoraSpec(3, 1))

    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
    assert layer(torch.empty(2, 7, device="meta", dtype=torch.bfloat16)).shape == (2, 5)


def test_only_linear_layers_are_wrapped() -> None:
    with pytest.raises(TypeError, match=exactly("LoraLinear wraps an nn.Linear or an Nf4Linear, got a Embedding")):
        LoraLinear(nn.Embedding(3, 4), LoraSpec(2, 1.0))


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("rank", 0, ValueError, "rank must be at least 1, got 0"),
        ("rank", -1, RuntimeError, "negative dimension -1"),
        ("alpha", math.inf, ValueError, "alpha must be finite, got inf"),
        ("dropout", 1.5, ValueError, "dropout must be in .*, got 1.5"),
    ],
)
def test_a_spec_is_checked_however_it_was_made(name: str, value: float, error: type[Exception], message: str) -> None:
    spec, base = LoraSpec(2, 1.0), nn.Linear(3, 4)
    object.__setattr__(spec, name, value)
    with pytest.raises(error, match=message):
        LoraLinear(base, spec)

    assert base.weight.requires_grad
