"""Any subject in a model's linear layers: which they are, and what is refused before anything is touched."""

from __future__ import annotations

import copy
from dataclasses import replace as changed
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from lora_bench.bench.workload import TARGETS
from lora_bench.models.bases import quantise
from lora_bench.models.inject import adapt, find_targets, replace
from lora_bench.reference import REFERENCE
from lora_bench.spec import LoraSpec
from lora_bench.subject import Layer, Subject
from tests.small_models import SPEC, Nested, micro

# Targets


def test_a_target_is_a_name_or_its_end_in_whole_components() -> None:
    model = Nested()

    assert list(find_targets(model, ["q_proj"])) == ["q_proj", "block.q_proj"]
    assert list(find_targets(model, ["block.q_proj"])) == ["block.q_proj"]
    assert list(find_targets(model, ["head", "xq_proj"])) == ["block.xq_proj", "head"]
    assert find_targets(model, ["block.q_proj"])["block.q_proj"] is model.block["q_proj"]
    assert len(find_targets(micro(), TARGETS)) == 14


def test_a_layer_in_two_places_is_found_in_both() -> None:
    model = Nested()
    found = find_targets(model, ["xq_proj", "twin"])

    assert list(found) == ["block.xq_proj", "twin"]
    assert found["twin"] is found["block.xq_proj"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_prj"], "target 'q_prj' matches no linear layer of the model; near misses: q_proj, xq_proj"),
        (["q_proj", "blok.q_proj"], "target 'blok.q_proj' matches no linear layer of the model; near misses: "),
        (["_proj"], "target '_proj' matches no linear layer of the model; near misses: q_proj, xq_proj"),
        (["7"], "target '7' matches no linear layer of the model; linear layers end in head, q_proj, twin, xq_proj"),
        (["embed"], "target 'embed' is no linear layer: embed is of type Embedding"),
        (["block"], "target 'block' is no linear layer: block is of type ModuleDict"),
        ([], "targets must be a list of at least one layer name, got []"),
        ("_proj", "target '_proj' matches no linear layer of the model; near misses: q_proj, xq_proj"),
    ],
)
def test_a_target_that_finds_nothing_is_an_error(targets: list[str], message: str) -> None:
    model = Nested()
    with pytest.raises(ValueError, match=r".") as caught:
        find_targets(model, targets)
    assert str(caught.value).startswith(message)
    with pytest.raises(ValueError, match="target"):
        adapt(model, REFERENCE, SPEC, targets)
    assert type(model.q_proj) is nn.Linear


def test_replace_puts_a_module_in_its_place_and_nowhere_else() -> None:
    model, other = Nested(), nn.Linear(4, 6)
    replace(model, "block.q_proj", other)

    assert model.block["q_proj"] is other
    assert model.q_proj is not other
    with pytest.raises(AttributeError, match="v_proj"):
        replace(model, "block.v_proj", other)


# Adapting


def test_adapting_twice_is_an_error() -> None:
    model = Nested()
    adapt(model, REFERENCE, SPEC, ["block.q_proj"])
    for again in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match=r"^the model is adapted already, by reference at block\.q_proj$"):
            adapt(again, REFERENCE, SPEC, ["twin", "xq_proj"])
    assert type(model.twin) is nn.Linear


def test_a_model_whose_adapters_are_gone_can_be_adapted_again() -> None:
    model = micro()
    for place, layer in adapt(model, REFERENCE, SPEC, TARGETS).items():
        replace(model, place, layer.merge_and_unload())

    assert len(adapt(model, REFERENCE, SPEC, TARGETS)) == 14


def test_a_layer_that_is_no_module_is_one_in_the_model() -> None:
    class Doubled:
        def __init__(self, base: nn.Module, _spec: LoraSpec) -> None:
            self.base = base

        def __call__(self, x: Tensor) -> Tensor:
            return 2 * cast("Tensor", self.base(x))

    model, x = Nested(), torch.randn(2, 4)
    before = model(x)
    layers = adapt(model, Subject("doubled", Doubled, lambda layer, factors: None), SPEC, ["twin", "xq_proj"])

    assert {type(layer) for layer in layers.values()} == {Doubled}
    assert torch.equal(model(x), 2 * before)


def test_a_layer_in_two_places_is_wrapped_once() -> None:
    model = Nested()
    layers = adapt(model, REFERENCE, SPEC, ["twin", "xq_proj"])

    assert layers["twin"] is layers["block.xq_proj"] is model.twin is model.block["xq_proj"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == SPEC.parameters(4, 4)


@pytest.mark.parametrize(("target", "message"), [("twin", "twin .* block.xq_proj"), ("head", "head .* embed")])
def test_a_layer_whose_weight_lives_elsewhere_too_is_refused(target: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message.replace('.*', 'shares its weight with')}: a merge would"):
        adapt(Nested(), REFERENCE, SPEC, [target])


def test_what_a_subject_does_not_offer_is_refused_before_anything_is_touched() -> None:
    model = micro()
    quantise(model, "nf4", ["q_proj"])
    narrow = changed(
        REFERENCE, name="narrow", layers=("linear",), supports=lambda spec: "no rsLoRA" if spec.rslora else None
    )
    with pytest.raises(ValueError, match=r"^narrow does not offer LoraSpec.*: no rsLoRA$"):
        adapt(model, narrow, LoraSpec(2, 4.0, rslora=True), ["k_proj"])
    with pytest.raises(
        ValueError, match=r"^narrow wraps linear layers, and model\.layers\.0\.self_attn\.q_proj is nf4$"
    ):
        adapt(model, narrow, SPEC, ["k_proj", "q_proj"])
    assert all(p.requires_grad for p in model.parameters())


def test_where_wrapping_fails_the_model_keeps_its_layers() -> None:
    def wrap(base: nn.Linear, spec: LoraSpec) -> Layer:
        if base.out_features == 32:
            raise RuntimeError("not this one")
        return REFERENCE.wrap(base, spec)

    model = micro()
    with pytest.raises(RuntimeError, match="not this one"):
        adapt(model, changed(REFERENCE, wrap=wrap), SPEC, ["q_proj", "k_proj"])
    assert {type(layer) for layer in find_targets(model, ["q_proj", "k_proj"]).values()} == {nn.Linear}
