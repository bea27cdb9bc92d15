"""The subjects that the GPU suites measure, judged in a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_bench import bounds, definition
from lora_bench.bench.workload import TARGETS
from lora_bench.bounds import Arithmetic, worst
from lora_bench.models.bases import dequantised, quantise
from lora_bench.models.build import build
from lora_bench.models.inject import adapt, find_targets
from lora_bench.models.routing import Router, route_model
from lora_bench.spec import Factors, LoraSpec
from tests.shipped_subjects import (
    BOTH_DTYPES,
    EVERY_COMPLETE_PLACE,
    EVERY_PLACE,
    MEASURED,
    subject_here,
)
from tests.small_models import SPEC

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def micro(kind: str, dtype: str) -> tuple[Any, dict[str, Tensor]]:
    """The micro preset with its linears quantised to a kind, and what each of them multiplies by."""
    model = build("micro", dtype=DTYPES[dtype], device="cpu")
    quantise(model, kind, TARGETS)
    return model, {place: dequantised(base).clone() for place, base in find_targets(model, TARGETS).items()}


def tokens(batch: int) -> Tensor:
    return torch.randint(128, (batch, 5), generator=torch.Generator().manual_seed(1))


def draw(weight: Tensor, spec: LoraSpec, seed: int) -> Factors:
    d_out, d_in = weight.shape
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(spec.rank, d_in, generator=generator) / d_in**0.5
    return Factors(a.to(weight.dtype), torch.randn(d_out, spec.rank, generator=generator).to(weight.dtype))


def capture(model: nn.Module, places: list[str], batch: int) -> dict[str, tuple[Tensor, Tensor]]:
    """What each layer got and gave in one forward: (batch, tokens, d_in) and (batch, tokens, d_out)."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(place: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        return lambda _, inputs, output: seen.update({place: (inputs[0].clone(), output.clone())})

    handles = [model.get_submodule(place).register_forward_hook(note(place)) for place in places]
    with torch.no_grad():
        model(tokens(batch))
    for handle in handles:
        handle.remove()
    assert list(seen) == places
    return seen


@EVERY_PLACE
@BOTH_DTYPES
def test_every_subject_computes_the_definition_in_every_layer_of_a_model(name: str, kind: str, dtype: str) -> None:
    subject, (model, weights) = subject_here(name, kind), micro(kind, dtype)
    layers = adapt(model, subject, SPEC, TARGETS)
    factors = {place: draw(weight, SPEC, seed) for seed, (place, weight) in enumerate(weights.items())}
    for place, layer in layers.items():
        subject.load(layer, factors[place])

    assert list(layers) == list(weights)
    for place, (x, y) in capture(model, list(layers), batch=3).items():
        terms = x.flatten(0, 1), weights[place], None, factors[place], SPEC.scaling
        allowed = bounds.separate(*terms, Arithmetic.of(DTYPES[dtype]))
        deviation = worst(y.flatten(0, 1), definition.forward(*terms), allowed)
        assert y.dtype == DTYPES[dtype]
        assert deviation.ratio <= 1, (place, deviation)
        assert bounds.visibility(definition.delta(terms[0], factors[place], SPEC.scaling), allowed) > 1, place


@EVERY_PLACE
def test_only_the_factors_train_and_they_are_r_times_d_plus_k(name: str, kind: str) -> None:
    subject, (model, weights) = subject_here(name, kind), micro(kind, "fp32")
    layers = adapt(model, subject, SPEC, TARGETS)
    assert subject.factors
    live = {id(tensor) for layer in layers.values() for tensor in (subject.factors(layer).a, subject.factors(layer).b)}
    trained = {id(parameter): parameter for parameter in model.parameters() if parameter.requires_grad}

    assert trained.keys() == live
    assert sum(map(torch.numel, trained.values())) == sum(SPEC.parameters(*w.T.shape) for w in weights.values())
    model(tokens(2), labels=tokens(2)).loss.backward()
    assert all(parameter.grad is not None for parameter in trained.values())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MEASURED)
def test_a_layer_takes_the_mode_of_the_model(name: str, training: bool) -> None:
    subject, (model, _) = subject_here(name), micro("linear", "fp32")
    adapt(model.train(training), subject, LoraSpec(2, 4.0, dropout=0.5), ["q_proj"])

    assert {module.training for module in model.modules()} == {training}


SPECS = [LoraSpec(2, 3.0), LoraSpec(5, 2.0), LoraSpec(3, 12.0)]
IDS = torch.tensor([1, -1, 0, 2, 1])


def routed(name: str, kind: str, dtype: str) -> tuple[Any, Router, dict[str, Tensor], dict[str, Any]]:
    subject, (model, weights) = subject_here(name, kind), micro(kind, dtype)
    layers = adapt(model, subject, SPEC, TARGETS)
    adapters = {}
    for seed, (place, weight) in enumerate(weights.items()):
        subject.load(layers[place], draw(weight, SPEC, 1000 + seed))
        adapters[place] = [(spec, draw(weight, spec, 10 * seed + index)) for index, spec in enumerate(SPECS)]
    return model, route_model(model, subject, layers, adapters), weights, adapters


@EVERY_COMPLETE_PLACE
@BOTH_DTYPES
def test_each_row_of_a_mixed_batch_goes_through_its_own_adapter(name: str, kind: str, dtype: str) -> None:
    model, router, weights, adapters = routed(name, kind, dtype)
    with router.ids(IDS):
        seen = capture(model, list(weights), batch=len(IDS))
    for place, (x, y) in seen.items():
        for row, index in enumerate(IDS.tolist()):
            spec, factors = adapters[place][max(index, 0)]
            terms = x[row], weights[place], None, factors, spec.scaling if index >= 0 else 0.0
            allowed = bounds.separate(*terms, Arithmetic.of(DTYPES[dtype]))
            deviation = worst(y[row], definition.forward(*terms), allowed)
            assert deviation.ratio <= 1, (place, index, deviation)
            assert index < 0 or bounds.visibility(definition.delta(x[row], factors, spec.scaling), allowed) > 1


@EVERY_COMPLETE_PLACE
def test_an_unknown_adapter_is_an_error(name: str, kind: str) -> None:
    model, router, _, _ = routed(name, kind, "fp32")
    with router.ids(torch.tensor([0, 3])), pytest.raises(IndexError, match=r"^adapter id 3 is not in the pool of 3$"):
        model(tokens(2))
    with pytest.raises(ValueError, match=r"^adapter ids start at -1 .no adapter., got -2$"):
        router.ids(torch.tensor([0, -2])).__enter__()
    assert router.plan is None
