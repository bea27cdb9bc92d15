"""The subjects that the GPU suites measure, judged verb by verb."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lora_bench import bounds, definition
from lora_bench.bounds import Arithmetic, worst
from lora_bench.case import Case
from lora_bench.models.bases import FOUR_BIT, base_layer, dequantised
from lora_bench.models.inject import layer_kind
from lora_bench.spec import Factors, LoraSpec
from lora_bench.subject import Layer, Subject
from lora_bench.subjects import find, missing
from tests.shipped_subjects import (
    BOTH_DTYPES,
    EVERY_COMPLETE_PLACE,
    EVERY_PLACE,
    MEASURED,
    PLACES,
    subject_here,
)


class Problem(NamedTuple):
    """A subject's layer over a base of one kind, with factors loaded, and the terms of its definition."""

    subject: Subject
    layer: Layer
    terms: tuple[Tensor, Tensor, Tensor | None, Factors, float]
    arithmetic: Arithmetic

    def excess(self, bound: Callable[..., Tensor], wanted: Tensor | None = None) -> float:
        """The output's deviation from the definition, or from another output, as a multiple of what `bound` allows."""
        with torch.no_grad():
            y = self.layer(self.terms[0])
        wanted = definition.forward(*self.terms) if wanted is None else wanted
        return worst(y, wanted, bound(*self.terms, self.arithmetic)).ratio


def problem(name: str, kind: str, dtype: str, *, loaded: bool = True) -> Problem:
    subject, case = subject_here(name, kind), Case(tokens=6, d_in=128, d_out=96, rank=5, dtype=dtype, bias=True)
    x, weight, bias, _, [(spec, factors)], _ = case.draw()
    linear = nn.Linear(128, 96, dtype=x.dtype)
    assert bias is not None
    linear.load_state_dict({"weight": weight, "bias": bias})
    base = linear if kind == "linear" else base_layer(kind, linear)
    dense = dequantised(base).clone()
    layer = subject.wrap(base, spec)
    if loaded:
        subject.load(layer, factors)
    return Problem(subject, layer, (x, dense, bias, factors, spec.scaling), Arithmetic.of(x.dtype))


@EVERY_PLACE
@BOTH_DTYPES
def test_a_new_layer_is_its_base(name: str, kind: str, dtype: str) -> None:
    new = problem(name, kind, dtype, loaded=False)
    x, weight, bias, _, _ = new.terms
    assert new.subject.factors
    live = new.subject.factors(new.layer)
    a, b = live.a, live.b

    assert new.excess(bounds.separate, definition.base(x, weight, bias)) <= 1
    assert not b.any()
    assert a.any()
    assert {id(a), id(b)} == {id(parameter) for parameter in new.layer.parameters() if parameter.requires_grad}


@EVERY_PLACE
@BOTH_DTYPES
def test_factors_state_and_weight_are_what_was_put_in(name: str, kind: str, dtype: str) -> None:
    loaded = problem(name, kind, dtype)
    subject, layer, (_, weight, _, factors, _), _ = loaded
    assert subject.factors
    assert subject.state
    assert subject.weight
    live = {name: value for name, value in vars(subject.factors(layer)).items() if value is not None}
    parameters = {id(parameter) for parameter in layer.parameters()}

    for name_, tensor in live.items():
        assert id(tensor) in parameters
        assert torch.equal(tensor.to(weight.dtype), vars(factors)[name_])
    assert [tuple(tensor.shape) for tensor in subject.state(layer).values()] == [(5, 128), (96, 5)]
    assert all(torch.equal(one, two) for one, two in zip(subject.state(layer).values(), live.values(), strict=True))
    assert torch.equal(subject.weight(layer), weight)
    with pytest.raises(ValueError, match="factors must be a"):
        subject.load(layer, Factors(torch.ones(1, 128), torch.ones(96, 1)))


@pytest.mark.parametrize("name", MEASURED)
@BOTH_DTYPES
def test_merging_writes_the_delta_into_the_weight_and_unmerging_takes_it_out(name: str, dtype: str) -> None:
    loaded = problem(name, "linear", dtype)
    subject, layer, (x, weight, bias, factors, scaling), arithmetic = loaded
    assert subject.merge
    assert subject.unmerge
    assert subject.weight
    merged = subject.merge(layer)
    wanted = definition.merged_weight(weight, factors, scaling)
    allowed = bounds.merged_weight(weight, factors, scaling, arithmetic)

    assert merged is None or merged is layer
    assert loaded.excess(bounds.merged) <= 1
    assert worst(subject.weight(layer), wanted, allowed).ratio <= 1
    subject.unmerge(layer)
    allowed = bounds.unmerged_weight(weight, factors, scaling, arithmetic)
    assert worst(subject.weight(layer), weight, allowed).ratio <= 1
    restored = loaded._replace(terms=(x, subject.weight(layer).clone(), bias, factors, scaling))
    assert restored.excess(bounds.separate) <= 1


@EVERY_COMPLETE_PLACE
@BOTH_DTYPES
def test_what_is_unloaded_is_one_merged_frozen_layer(name: str, kind: str, dtype: str) -> None:
    loaded = problem(name, kind, dtype)
    assert loaded.subject.merge_and_unload
    (x, weight, _, factors, scaling), arithmetic = loaded.terms, loaded.arithmetic
    with torch.no_grad():
        loaded.layer.eval()(x)
    unloaded = loaded.subject.merge_and_unload(loaded.layer)

    assert not any(parameter.requires_grad for parameter in unloaded.parameters())
    assert layer_kind(unloaded) == ("linear4bit" if kind == "linear4bit" else "linear")
    if kind == "linear4bit":
        live = loaded.subject.factors(loaded.layer)  # type: ignore[misc]
        dense = nn.Linear(128, 96, bias=False)
        dense.weight = nn.Parameter(weight + scaling * (live.b @ live.a))
        assert torch.equal(dequantised(unloaded), dequantised(base_layer(kind, dense)).to(weight.dtype))
        assert worst(dequantised(unloaded), weight).ratio > 1
    else:
        allowed = bounds.merged_weight(weight, factors, scaling, arithmetic)
        assert worst(dequantised(unloaded), definition.merged_weight(weight, factors, scaling), allowed).ratio <= 1
        assert loaded._replace(layer=unloaded).excess(bounds.merged) <= 1


@EVERY_COMPLETE_PLACE
@BOTH_DTYPES
def test_switched_off_a_layer_is_its_base(name: str, kind: str, dtype: str) -> None:
    loaded = problem(name, kind, dtype)
    x, weight, bias, _, _ = loaded.terms
    assert loaded.subject.enable
    loaded.subject.enable(loaded.layer, False)
    assert loaded.excess(bounds.separate, definition.base(x, weight, bias)) <= 1
    loaded.subject.enable(loaded.layer, True)
    assert loaded.excess(bounds.separate) <= 1


def test_peft_keeps_its_default_of_float32_factors() -> None:
    loaded = problem("peft", "linear", "bf16")
    assert loaded.subject.factors

    assert loaded.subject.factors(loaded.layer).a.dtype == torch.float32
    assert loaded.layer(loaded.terms[0]).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["linear", "linear4bit"])
def test_peft_s_pools_leave_the_layer_and_each_other_alone(kind: str) -> None:
    loaded = problem("peft", kind, "fp32")
    subject, layer, (x, weight, bias, factors, scaling), arithmetic = loaded
    assert subject.pool
    assert subject.plan
    assert subject.route
    spec = LoraSpec(5, scaling * 5, dropout=0.5)
    other = Factors(factors.a.flip(0, 1), factors.b)
    pools = [subject.pool(layer, [(spec, factors), (spec, other)]), subject.pool(layer, [(spec, other)])]
    for pool, index, wanted in ((pools[0], 0, factors), (pools[0], 1, other), (pools[1], 0, other)):
        y = subject.route(layer, pool, x, subject.plan(torch.full((6,), index), x.device))
        terms = x, weight, bias, wanted, scaling
        assert worst(y, definition.forward(*terms), bounds.separate(*terms, arithmetic)).ratio <= 1
    assert not any(parameter.requires_grad for pool in pools for parameter in pool.parameters())
    assert loaded.excess(bounds.separate) <= 1
    assert {name for name, parameter in layer.named_parameters() if parameter.requires_grad} == subject.state(
        layer
    ).keys()  # type: ignore[misc]
    with pytest.raises(ValueError, match=r"^a pool needs at least one adapter, got none$"):
        subject.pool(layer, [])
    with pytest.raises(ValueError, match="factors must be a"):
        subject.pool(layer, [(LoraSpec(2, 1.0), factors)])
    subject.merge(layer)  # type: ignore[misc]
    with pytest.raises(RuntimeError, match="unmerge before routing"):
        subject.route(layer, pools[0], x, subject.plan(torch.zeros(6, dtype=torch.int64), x.device))


def test_loralib_s_eval_is_no_merge_until_it_is_asked_for() -> None:
    loaded = problem("loralib", "linear", "fp32")
    subject, layer, (_, weight, _, _, _), _ = loaded
    assert subject.merge
    assert subject.unmerge
    layer.eval()
    assert torch.equal(layer.weight, weight)
    subject.merge(layer)
    assert not torch.equal(layer.weight, weight)
    subject.unmerge(layer)
    unmerged = layer.weight.clone()
    layer.eval()
    assert torch.equal(layer.weight, unmerged)


def test_every_shipped_subject_and_kind_of_base_is_tried_here() -> None:
    here = [name for name in MEASURED if missing(name) is None]

    assert {(name, kind) for name in here for kind in find(name).layers if kind in ("linear", *FOUR_BIT)} == {
        (name, kind) for name, kind in PLACES if name in here
    }
    assert {name for name, _ in PLACES} == set(MEASURED)
