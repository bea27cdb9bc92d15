"""Shapes: what follows from a configuration is what the built model has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from lora_bench.bench.workload import TARGETS
from lora_bench.models.build import build
from lora_bench.models.inject import find_targets
from lora_bench.models.presets import PRESETS
from lora_bench.models.shapes import Shapes, shapes

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama, heads wider than hidden": LlamaConfig(**SIZES, head_dim=16),
    "llama, tied, biased": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
}


def written(folder: Path, **config: Any) -> str:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | SIZES | config))
    return str(folder)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_as_many_parameters_as_its_model(name: str) -> None:
    model = build(name, dtype=torch.bfloat16, device="meta")

    found = shapes(name)

    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert sum(count for count, _ in found.tensors) == len(list(model.parameters()))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_folder_s_configuration_is_enough(config: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()

    found = shapes(str(tmp_path))

    assert isinstance(found, Shapes)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert sum(count for count, _ in found.tensors) == len(list(model.parameters()))
    for name, linear in find_targets(model, TARGETS).items():
        end = name.rpartition(".")[2]
        assert isinstance(linear, nn.Linear)
        assert found.linears[end] == (linear.in_features, linear.out_features)
        assert (end in found.biased) is any(name == "bias" for name, _ in linear.named_parameters())


def test_what_a_configuration_leaves_out_is_what_transformers_takes(tmp_path: Path) -> None:
    few = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | few))

    assert shapes(str(tmp_path)) == Shapes(96, 48, 80, layers=3, heads=6, kv_heads=6, head_dim=8)


def test_the_linear_layers_are_those_that_are_measured() -> None:
    assert tuple(shapes("tiny").linears) == TARGETS


def test_lora_adds_rank_times_both_widths() -> None:
    tiny = shapes("tiny")

    assert tiny.lora_parameters(4, ("q_proj", "down_proj")) == 8 * 4 * ((512 + 512) + (1408 + 512))
    assert tiny.lora_tensors(4, ("down_proj",)) == [(8, 4 * 1408), (8, 4 * 512)]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ((), "targets must name at least one of q_proj, "),
        (("q_prj",), "a target is one of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, got 'q_prj'"),
        (("q_proj", "q_proj"), "every target must be named once, got 'q_proj' 2 times"),
    ],
)
def test_targets_that_are_none_are_refused(targets: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shapes("tiny").lora_parameters(4, targets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type must be one of llama, mistral, qwen2, got 'gpt2'"),
        ({"hidden_size": None}, "hidden_size must be a whole number of at least 1, got None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number of at least 1, got 0"),
        ({"num_attention_heads": 5}, "num_attention_heads must divide the hidden_size 48, got 5"),
        ({"num_key_value_heads": 4}, "kv_heads must divide the 6 heads, got 4"),
        ({"head_dim": -8}, "head_dim must be a whole number of at least 1, got -8"),
        ({"quantization_config": {"bits": 4}}, "the checkpoint is quantised already"),
        ({"model_type": "mistral"}, "attention in a sliding window, here of 4096 tokens, is not known"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 7}, "here of 7 tokens"),
    ],
)
def test_a_configuration_that_is_not_understood_says_where_and_why(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        shapes(written(tmp_path, **change))


@pytest.mark.parametrize("text", ["[1, 2]", "{"])
def test_a_file_that_is_no_configuration_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)

    with pytest.raises(ValueError, match=r"config\.json: "):
        shapes(str(tmp_path))


@pytest.mark.parametrize("name", ["llama-3-8bb", "nowhere/at/all"])
def test_an_unknown_model_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"no model is called '{name}'"):
        shapes(name)


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        shapes(str(tmp_path))


def test_a_single_layer_s_shapes_are_its_name_s() -> None:
    found = shapes("linear-24x40")

    assert found.linears == {"linear": (24, 40)}
    assert found.parameters == 24 * 40
    assert found.lora_parameters(4, ("linear",)) == 4 * (24 + 40)
    with pytest.raises(ValueError, match=r"^a target is one of linear, got 'q_proj'$"):
        found.lora_parameters(4, ("q_proj",))
