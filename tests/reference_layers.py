"""What the tests of the reference layer have in common: a case as a layer, and judging it by the definition."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar, cast

import pytest
import torch
from torch import Tensor, nn

from lora_bench import bounds, definition
from lora_bench.bounds import Arithmetic
from lora_bench.case import DTYPES, Case, Problem
from lora_bench.conformance.trial import Trial
from lora_bench.reference import REFERENCE, LoraLayer, LoraLinear
from lora_bench.reference.several import add
from lora_bench.spec import Factors, LoraSpec
from tests.expected import within

Layer = TypeVar("Layer", bound=nn.Module)
NAMES = ("default", "b", "c")
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


def pickled(layer: Layer) -> Layer:
    return cast("Layer", pickle.loads(pickle.dumps(layer)))  # noqa: S301


def of_kind(case: Case) -> tuple[Trial, LoraLayer]:
    """The case as a layer of its kind with its factors loaded, and what it is judged by."""
    trial = Trial(REFERENCE, case)
    layer = trial.layer()
    assert isinstance(layer, LoraLayer)
    return trial, layer


def made_several(case: Case) -> tuple[LoraLinear, Problem]:
    """The case's first adapter as the layer's own, and the others beside it."""
    problem = case.draw()
    layer = LoraLinear(base_of(problem), case.spec)
    layer.load(problem.adapters[0][1])
    for name, (spec, factors) in zip(NAMES[1:], problem.adapters[1:], strict=False):
        add(layer, name, spec, factors)
    return layer, problem


def stacked(problem: Problem, weights: Mapping[str, float]) -> tuple[Factors, float]:
    """The adapters of these names, each times its weight, as one."""
    several = [(weight, *problem.adapters[NAMES.index(name)]) for name, weight in weights.items()]
    none = problem.weight.double()[:0], problem.weight.double()[:, :0]
    a = [none[0], *(factors.a.double() for _, _, factors in several)]
    b = [none[1], *(weight * spec.scaling * factors.b.double() for weight, spec, factors in several)]
    return Factors(torch.cat(a), torch.cat(b, 1)), 1.0


def obeys(
    layer: Callable[[Tensor], Tensor], problem: Problem, beside: Mapping[str, float], merged: Mapping[str, float]
) -> bool:
    """Whether the output is the base's and the sum of these adapters, of which some are in the weight."""
    x, w, bias, *_ = problem
    inside, arithmetic = stacked(problem, merged), Arithmetic.of(x.dtype)
    weight = definition.merged_weight(w, *inside)
    slack = bounds.merged_weight(w, *inside, arithmetic) if merged else torch.zeros_like(weight)
    terms = (bias, *stacked(problem, beside))
    allowed = bounds.separate(x, weight.abs() + slack, *terms, arithmetic, sums=1 + len(beside))
    return within(layer(x), definition.forward(x, weight, *terms), allowed + x.double().abs() @ slack.T)


def ones(names: Iterable[str]) -> dict[str, float]:
    return dict.fromkeys(names, 1.0)
