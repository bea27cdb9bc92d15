"""Mixed batches in a model: one plan a forward, within the router alone."""

from __future__ import annotations

from dataclasses import replace as changed
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from lora_bench.models.inject import adapt
from lora_bench.models.routing import Router, route_model
from lora_bench.reference import REFERENCE
from lora_bench.reference.batched import plan as reference_plan
from lora_bench.spec import Factors
from lora_bench.subject import Subject
from tests.expected import exactly
from tests.small_models import SPEC

IDS = torch.tensor([1, -1, 0, 1])


def routed(subject: Subject = REFERENCE) -> tuple[nn.Module, Router]:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    layers = adapt(model, subject, SPEC, ["0", "1"])
    adapters = [(SPEC, Factors(torch.randn(3, 4), torch.randn(4, 3))) for _ in range(2)]
    return model, route_model(model, subject, layers, dict.fromkeys(layers, adapters))


def test_a_forward_outside_of_the_router_is_an_error() -> None:
    model, router = routed()
    message = "a routed layer needs adapter ids: run the forward inside `with router.ids(ids):`"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=exactly(message)):
            model(torch.ones(4, 4))
        with router.ids(IDS):
            y = model(torch.ones(4, 4))
        assert torch.equal(y[0], y[3])
        assert not torch.equal(y[0], y[2])


def test_the_router_makes_one_plan_a_forward_and_restores_what_was_before() -> None:
    planned: list[int] = []

    def plan(ids: Tensor, device: torch.device) -> object:
        planned.append(len(ids))
        return reference_plan(ids, device)

    def fail_inside() -> None:
        with router.ids(IDS[:2]):
            model(torch.ones(2, 4))
            assert router.plan is not outer
            raise ZeroDivisionError

    model, router = routed(changed(REFERENCE, plan=plan))
    with router.ids(IDS):
        outer = router.plan
        with pytest.raises(ZeroDivisionError):
            fail_inside()
        assert router.plan is outer
        with router.ids(IDS[:1]):
            model(torch.ones(1, 4))
        assert router.plan is outer
        model(torch.ones(4, 4))
    assert router.plan is None
    assert planned == [4, 2, 1]


def test_ids_that_the_subject_refuses_change_nothing() -> None:
    _, router = routed()
    with router.ids(IDS):
        outer = router.plan
        with pytest.raises(ValueError, match="adapter ids start at -1"), router.ids(torch.tensor([-2])):
            pass
        assert router.plan is outer


def test_a_subject_without_a_plan_gets_the_ids_themselves() -> None:
    got: list[tuple[object, object]] = []

    def route(layer: nn.Module, pool: object, x: Tensor, ids: Tensor) -> Tensor:
        got.append((pool, ids))
        return cast("Tensor", layer(x))

    model, router = routed(changed(REFERENCE, plan=None, pool=lambda *_: "pool", route=route))
    with router.ids(IDS):
        model(torch.ones(4, 4))

    assert got == [("pool", IDS)] * 2


def test_a_model_that_cannot_be_routed_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    layers = adapt(model, REFERENCE, SPEC, ["0", "1"])
    adapters = {"0": [(SPEC, Factors(torch.ones(3, 4), torch.ones(4, 3)))]}
    with pytest.raises(ValueError, match=r"adapters and no other does; they differ in 1$"):
        route_model(model, REFERENCE, layers, adapters)
    with pytest.raises(ValueError, match=r"^single offers no mixed batches: it needs the verbs pool and route$"):
        route_model(model, changed(REFERENCE, name="single", pool=None), layers, adapters)
    assert model[0] is layers["0"]


def test_a_routed_model_counts_as_adapted() -> None:
    model, _ = routed()
    with pytest.raises(ValueError, match=r"^the model is adapted already, by reference at 0$"):
        adapt(model, REFERENCE, SPEC, ["base_layer"])
