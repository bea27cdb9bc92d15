"""The reference layer: LoRA by its definition, exactly where exactness can be had and within the bounds elsewhere."""

import copy
import math
import pickle
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_bench import bounds, definition
from lora_bench.bounds import Arithmetic, worst
from lora_bench.case import DTYPES, Case, Problem, cases
from lora_bench.reference import REFERENCE, LoraLinear, Nf4Linear
from lora_bench.spec import Factors, LoraSpec

Copy = Callable[[LoraLinear], LoraLinear]
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def base_of(problem: Problem) -> nn.Linear:
    base = nn.Linear(problem.x.shape[1], len(problem.weight), bias=problem.bias is not None, dtype=problem.x.dtype)
    base.load_state_dict({"weight": problem.weight} | ({} if problem.bias is None else {"bias": problem.bias}))
    return base


def made(case: Case, dropout: float = 0.0) -> tuple[LoraLinear, Problem, Factors]:
    """The case as a layer with its factors loaded."""
    problem = case.draw()
    layer = LoraLinear(base_of(problem), LoraSpec(case.rank, case.alpha, dropout, case.rslora))
    layer.load(problem.adapters[0][1])
    return layer, problem, problem.adapters[0][1]


def within(found: Tensor, wanted: Tensor, allowed: Tensor | float) -> bool:
    return worst(found, wanted, allowed).ratio <= 1


def obey(layer: LoraLinear, problem: Problem, w: Tensor) -> None:
    """Assert that output and gradients of `layer` over a base weight w are those of the definition."""
    x, given_ = problem.x.clone().requires_grad_(), (w, problem.adapters[0][1], layer.spec.scaling)
    arithmetic, y = Arithmetic.of(x.dtype), layer(x)
    y.backward(problem.grad)
    assert y.dtype == x.dtype
    w, factors, s = given_
    wanted = definition.forward(problem.x, w, problem.bias, factors, s)
    assert within(y, wanted, bounds.separate(problem.x, w, problem.bias, factors, s, arithmetic))

    gradients = definition.gradients(problem.x, problem.grad, *given_)
    allowed = bounds.gradients(problem.x, problem.grad, *given_, arithmetic)
    for leaf, gradient, limit in zip((layer.lora_A, layer.lora_B, x), gradients, allowed, strict=True):
        assert leaf.grad is not None
        assert leaf.grad.dtype == x.dtype
        assert within(leaf.grad, gradient, limit)
    assert all(parameter.grad is None for parameter in layer.base_layer.parameters())


def refuses(error: type[Exception], message: str) -> AbstractContextManager[object]:
    return pytest.raises(error, match=f"^{re.escape(message)}$")


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
        with refuses(RuntimeError, "enable the adapter before merging it"):
            layer.merge()
        layer.enable(True)
        assert torch.equal(layer(problem.x), with_adapter)


def test_what_would_go_wrong_in_silence_is_refused() -> None:
    layer, problem, factors = made(Case(rank=3))
    short = Factors(factors.a[:2], factors.b[:, :2])
    with refuses(ValueError, "factors must be a (3, 5) and b (4, 3) here, got a (2, 5) and b (4, 2)"):
        layer.load(short)
    layer.merge()
    with refuses(RuntimeError, "unmerge before loading other factors: the merged weight holds the old ones"):
        layer.load(factors)
    with refuses(RuntimeError, "unmerge before training: a merged adapter gets no gradient"):
        layer.train()
    assert layer.eval() is layer
    layer.unmerge()
    assert layer.train() is layer
    assert layer.training
    layer.load(factors)
    assert torch.equal(layer(problem.x), made(Case(rank=3))[0](problem.x))


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


def pickled(layer: LoraLinear) -> LoraLinear:
    return cast("LoraLinear", pickle.loads(pickle.dumps(layer)))  # noqa: S301


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
    layer.to(to).unmerge()
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


@pytest.mark.parametrize("merged", ["saved", "loaded into"])
def test_a_whole_state_does_not_apply_the_adapter_twice(merged: str) -> None:
    layer, (x, w, bias, *_), factors = made(Case())
    other, *_ = made(Case(seed=1))
    (layer if merged == "saved" else other).merge()
    with suppress(RuntimeError):  # refusing is as good
        other.load_state_dict(layer.state_dict())
        wanted = definition.forward(x, w, bias, factors, layer.spec.scaling)
        allowed = bounds.merged(x, w, bias, factors, layer.spec.scaling, Arithmetic.of(x.dtype))
        assert within(other(x), wanted, allowed)
        other.unmerge()
        assert within(other(x), wanted, allowed)


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
    with refuses(TypeError, "a 4-bit base cannot hold W + s B A; merge_and_unload gives a dense layer"):
        layer.merge()
    deployed, given_ = layer.merge_and_unload(), (problem.x, w, problem.bias, factors, case.spec.scaling)
    assert type(deployed) is nn.Linear
    allowed = bounds.merged(*given_, Arithmetic.of(w.dtype))
    assert within(deployed(problem.x), definition.forward(*given_), allowed)
    assert all(torch.equal(held[name], buffer) for name, buffer in base.state_dict().items())


def test_only_linear_layers_are_wrapped() -> None:
    with refuses(TypeError, "LoraLinear wraps an nn.Linear or an Nf4Linear, got a Embedding"):
        LoraLinear(nn.Embedding(3, 4), LoraSpec(2, 1.0))  # type: ignore[arg-type]  # the mistake under test


def test_what_is_switched_off_is_not_deployed() -> None:
    layer, *_ = made(Case())
    layer.enable(False)

    with refuses(RuntimeError, "enable the adapter before merging it"):
        layer.merge_and_unload()


def test_values_that_the_dtype_cannot_hold_are_not_loaded() -> None:
    layer, _, factors = made(Case(dtype="fp16"))
    with refuses(ValueError, "torch.float16 cannot hold factor a: it has the value 1e+06"):
        layer.load(Factors(torch.full((2, 5), 1e6), torch.zeros(4, 2)))

    assert torch.equal(layer.lora_A, factors.a)
