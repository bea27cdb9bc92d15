"""The reference in a model: what it computes and trains, merged and unloaded, with tied weights too."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lora_bench.reference.model import LoraModel, adapt
from lora_bench.spec import LoraSpec
from tests.adapted_models import IDS, KINDS, SPEC, Small, drawn, llama, marks

pytestmark = marks


def merged_by_hand(model: Small, adapted: LoraModel) -> Tensor:
    """The output of a plain model with W + s B A for the weights, and with the copies."""
    plain = copy.deepcopy(model)
    for name, layer in adapted.layers.items():
        weight = plain.get_submodule(name).get_parameter("weight")
        delta = layer.spec.scaling * layer.lora_B.flatten(1) @ layer.lora_A.flatten(1)
        weight.data += (delta.T if name in ("table", "block.q_turned") else delta).reshape(weight.shape)
    for name, value in adapted.saved_state().items():
        plain.state_dict()[name].copy_(value)
    y: Tensor = plain(IDS)
    return y


# What it computes, and what trains


def test_the_output_is_that_of_the_merged_weights() -> None:
    model = Small()
    adapted = drawn(copy.deepcopy(model), KINDS, modules_to_save=["head"])
    y, wanted = adapted(IDS), merged_by_hand(model, adapted)

    assert torch.equal(y, wanted)
    assert not torch.equal(y, model(IDS))
    adapted.merge()
    assert torch.equal(adapted(IDS), wanted)
    assert not torch.equal(adapted.layers["q"].base_layer.weight, model.q.weight)
    adapted.unmerge()
    assert torch.equal(adapted.layers["q"].base_layer.weight, model.q.weight)
    assert torch.equal(adapted(IDS), wanted)
    plain = adapted.merge_and_unload()
    assert {name: type(module) for name, module in plain.named_modules()} == {
        name: type(module) for name, module in model.named_modules()
    }
    assert torch.equal(plain(IDS), wanted)


def test_off_is_the_plain_model_also_after_a_merge() -> None:
    model = Small()
    adapted = drawn(copy.deepcopy(model), KINDS, modules_to_save=["head"])
    wanted = adapted(IDS)
    for merged in (False, True):
        if merged:
            adapted.merge()
        adapted.enable(False)
        assert torch.equal(adapted(IDS), model(IDS))
        adapted.enable(True)
        assert torch.equal(adapted(IDS), wanted)


def test_a_fresh_model_is_its_base_and_keeps_its_mode() -> None:
    model = Small()
    wanted = model(IDS)
    adapted = adapt(model, LoraSpec(2, 3.0, dropout=0.5), KINDS, modules_to_save=["head"])

    assert torch.equal(adapted(IDS), wanted)
    assert not any(module.training for module in adapted.modules())
    assert all(module.training for module in adapt(Small().train(), SPEC, ["q"], modules_to_save=["head"]).modules())


def test_factors_and_copies_train_and_nothing_else_changes() -> None:
    model = Small()
    before = copy.deepcopy(model)
    adapted = drawn(model, KINDS, modules_to_save=["head"])
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    factors = {f"model.{name}.{factor}" for name in (*KINDS, "block.q") for factor in ("lora_A", "lora_B")}
    assert trainable == factors | {"model.head.copy.weight", "model.head.copy.bias"}

    optimiser = torch.optim.SGD(adapted.parameters(), lr=0.1)
    old = {name: parameter.detach().clone() for name, parameter in adapted.named_parameters()}
    adapted(IDS).pow(2).sum().backward()
    optimiser.step()

    changed = {name for name, parameter in adapted.named_parameters() if not torch.equal(parameter, old[name])}
    assert changed == trainable
    for name, value in adapted.unload().state_dict().items():
        assert torch.equal(value, before.state_dict()[name])


def test_unloading_gives_the_plain_model_back_also_after_a_merge() -> None:
    model = Small()
    modules, before = list(model.modules()), copy.deepcopy(model)
    adapted = drawn(model, KINDS, modules_to_save=["head"])
    adapted.merge()

    assert adapted.unload() is model
    assert list(model.modules()) == modules
    assert torch.equal(model(IDS), before(IDS))


def test_a_merge_that_fails_half_way_merges_nothing() -> None:
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "last": nn.Conv2d(4, 4, 1, groups=2)})
    adapted = drawn(model, ["first", "last"])
    before = adapted.layers["first"].base_layer.weight.clone()
    for verb in (adapted.merge, adapted.merge_and_unload):
        with pytest.raises(NotImplementedError, match=r"^with 2 groups B A is no kernel"):
            verb()
        assert torch.equal(adapted.layers["first"].base_layer.weight, before)
        assert not adapted.layers["first"].merged
        assert model["first"] is adapted.layers["first"]
    adapted.enable(False)
    with pytest.raises(RuntimeError, match="enable the adapter"):
        adapted.merge_and_unload()


def test_a_layer_in_two_places_has_one_adapter() -> None:
    model = Small()
    model.block["xq"] = model.block["q"]
    adapted = adapt(model, SPEC, ["block.q", "block.xq"])

    assert adapted.layers["block.q"] is adapted.layers["block.xq"] is model.block["xq"]
    adapted.merge()


# Tied weights


def test_a_tied_head_is_untied_when_it_is_merged(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    adapted = drawn(model, ["lm_head"])
    embeddings = model.model.embed_tokens.weight.clone()
    wanted = adapted(IDS).logits
    with pytest.raises(
        ValueError, match=r"^lm_head shares its weight with model\.embed_tokens: merge_and_unload gives"
    ):
        adapted.merge()
    plain: Any = adapted.merge_and_unload()

    assert torch.equal(plain.model.embed_tokens.weight, embeddings)
    torch.testing.assert_close(plain(IDS).logits, wanted, rtol=0, atol=1e-12 * float(wanted.abs().max()))
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(again(IDS).logits, plain(IDS).logits)


def test_a_tied_head_that_trains_as_a_whole_is_untied() -> None:
    model = llama(tie_word_embeddings=True)
    adapted = drawn(model, ["q_proj"], modules_to_save=["lm_head"])
    adapted.merge()

    assert not torch.equal(adapted.saved_state()["lm_head.weight"], model.model.embed_tokens.weight)
    plain: Any = adapted.merge_and_unload()
    assert plain.config.tie_word_embeddings is False


def test_a_layer_with_another_place_that_is_no_target_is_not_merged() -> None:
    model = Small()
    model.block["xq"] = model.block["q"]
    with pytest.raises(ValueError, match=r"^block\.q shares its weight with block\.xq: "):
        adapt(model, SPEC, ["block.q"]).merge()


def test_two_targets_with_one_weight_are_not_merged_into_it() -> None:
    model = Small()
    model.block["xq"].weight = model.block["q"].weight
    with pytest.raises(ValueError, match=r"^block\.q shares its weight with block\.xq: "):
        adapt(model, SPEC, ["block.q", "block.xq"]).merge()
