"""The reference in a model: exactly the layers that PEFT adapts are adapted, and no others."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_bench.reference.lifecycle import LoraLayer
from lora_bench.reference.model import adapt
from tests.adapted_models import SPEC, Small, llama, marks

pytestmark = marks


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ({"targets": ["q"]}, {"q", "block.q"}),
        ({"targets": ["block.q"]}, {"block.q"}),
        ({"targets": ["xq", "head"]}, {"block.xq", "head"}),
        ({"targets": r"(block\.)?x?q"}, {"q", "block.q", "block.xq"}),
        ({"targets": r".*q"}, {"q", "block.q", "block.xq"}),
        ({"targets": "q"}, {"q"}),
        ({"targets": ["q"], "exclude": ["block.q"]}, {"q"}),
        ({"targets": ["q", "head"], "exclude": r"block.*"}, {"q", "head"}),
        ({"targets": "all-linear"}, {"q", "block.q", "block.xq", "block.q_turned", "head"}),
        ({"targets": "all-linear", "exclude": ["q", "q_turned"]}, {"block.xq", "head"}),
        ({"targets": "all-linear", "modules_to_save": ["head"]}, {"q", "block.q", "block.xq", "block.q_turned"}),
        ({"targets": ["q", "q_turned"], "modules_to_save": ["block.q"]}, {"q", "block.q_turned"}),
        ({"targets": ["table", "line"]}, {"table", "line"}),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),
)
def test_exactly_the_layers_that_peft_adapts_are_adapted(words: dict[str, Any], names: set[str]) -> None:
    model = Small()
    adapted = adapt(model, SPEC, **words)
    theirs: dict[str, Any] = {"exclude": "exclude_modules", "targets": "target_modules"}
    config = LoraConfig(r=2, **{theirs.get(name, name): value for name, value in words.items()})
    peft = get_peft_model(Small(), config).base_model.targeted_module_names

    assert adapted.layers.keys() == names == set(peft)
    assert {name for name, module in model.named_modules() if isinstance(module, LoraLayer)} == names


def test_all_linear_leaves_out_the_head_of_a_language_model() -> None:
    adapted = adapt(llama(), SPEC, "all-linear")
    peft = get_peft_model(llama(), LoraConfig(target_modules="all-linear")).base_model.targeted_module_names

    assert adapted.layers.keys() == set(peft)
    assert len(adapted.layers) == 7
    assert "lm_head" not in adapted.layers


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"targets": ["q_proj"]}, "target 'q_proj' matches no adaptable layer of the model; "),
        ({"targets": ["q", "k"]}, "target 'k' matches no adaptable layer of the model; "),
        ({"targets": ["bl.ck.q"]}, "target 'bl.ck.q' matches no adaptable layer of the model; near misses: block.q"),
        ({"targets": []}, "targets must be a list of at least one layer name, got []"),
        ({"targets": "(q"}, "the pattern '(q' is no regular expression: "),
        ({"targets": "block"}, "target 'block' is no adaptable layer: block is of type ModuleDict"),
        ({"targets": ["q", "norm"]}, "target 'norm' is no adaptable layer: norm is of type LayerNorm"),
        ({"targets": ["q"], "exclude": ["q"]}, "target 'q' matches no adaptable layer of the model; near misses: xq"),
        ({"targets": ["q"], "exclude": "("}, "the pattern '(' is no regular expression: "),
        ({"targets": ["head"], "modules_to_save": ["head"]}, "every layer that ['head'] names is in modules_to_save"),
        ({"targets": ["head"], "modules_to_save": ["tail"]}, "'tail' matches no module of the model"),
        ({"targets": ["head"], "modules_to_save": ["block"]}, "'block' matches block, a ModuleDict"),
    ],
    ids=str,
)
def test_a_target_that_finds_nothing_or_something_else_is_an_error(words: dict[str, Any], message: str) -> None:
    model = Small()
    with pytest.raises(ValueError, match=r".") as caught:
        adapt(model, SPEC, **words)

    assert str(caught.value).startswith(message)
    assert not any(isinstance(module, LoraLayer) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_layer_whose_own_module_reads_its_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"is of type NonDynamicallyQuantizableLinear$"):
        adapt(nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)}), SPEC, "all-linear")


def test_a_model_is_adapted_once() -> None:
    adapted = adapt(Small(), SPEC, ["head"])
    for model in (adapted, adapted.model, adapt(Small(), SPEC, ["q"], modules_to_save=["head"]).model):
        with pytest.raises(ValueError, match=r"^the model is adapted already, at "):
            adapt(model, SPEC, ["block.xq"])
