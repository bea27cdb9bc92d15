"""The reference in a model: one format on disk with PEFT."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_bench.reference.model import restore, save
from lora_bench.spec import LoraSpec
from tests.adapted_models import IDS, KINDS, Small, drawn, llama, marks, whole

pytestmark = marks


WORDS: list[dict[str, Any]] = [
    {"targets": KINDS},
    {"targets": "all-linear", "modules_to_save": ["head"]},
    {"targets": r".*q", "exclude": ["block.q"]},
    {"targets": ["q"], "spec": LoraSpec(4, 3.0, rslora=True, lora_bias=True, dropout=0.25)},
]


@pytest.mark.parametrize("words", WORDS, ids=str)
def test_what_is_saved_is_restored_by_us_and_by_peft(words: dict[str, Any], tmp_path: Path) -> None:
    model = Small()
    adapted = drawn(copy.deepcopy(model), **words)
    save(adapted, tmp_path)
    ours = restore(copy.deepcopy(model), tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path)).eval()

    assert torch.equal(ours(IDS), adapted(IDS))
    assert torch.equal(theirs(IDS), adapted(IDS))
    assert ours.layers.keys() == adapted.layers.keys() == set(theirs.base_model.targeted_module_names)
    assert {name: layer.spec for name, layer in ours.layers.items()} == {
        name: layer.spec for name, layer in adapted.layers.items()
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    named = words["targets"] if words["targets"] != "all-linear" else sorted(adapted.layers)
    assert config["target_modules"] == named
    assert config["fan_in_fan_out"] == ("block.q_turned" in adapted.layers)
    trainable = [[n for n, p in one.named_parameters() if p.requires_grad] for one in (ours, adapted)]
    assert trainable[0] == trainable[1]
    save(ours, tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_convolution_with_groups_is_saved_in_its_blocks(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)).double(), torch.randint(-2, 3, (2, 4, 5, 5)).double()
    whole(model)
    adapted = drawn(copy.deepcopy(model), ["0"])
    save(adapted, tmp_path)

    assert torch.equal(restore(copy.deepcopy(model), tmp_path)(x), adapted(x))
    assert torch.equal(PeftModel.from_pretrained(model, str(tmp_path)).eval()(x), adapted(x))


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": KINDS, "modules_to_save": ["head"], "lora_alpha": 3},
        {"target_modules": "all-linear", "rank_pattern": {"block.*": 4}, "alpha_pattern": {"q": 5, "head": 6}},
        {"target_modules": ["q", "line"], "use_rslora": True, "lora_bias": True},
    ],
    ids=str,
)
def test_what_peft_saves_is_restored(config: dict[str, Any], tmp_path: Path) -> None:
    model = Small()
    theirs: Any = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, **config)).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randint(-2, 3, parameter.shape))
    theirs.save_pretrained(str(tmp_path))
    ours = restore(model, tmp_path)

    assert torch.equal(ours(IDS), theirs(IDS))
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == theirs.get_nb_trainable_parameters()[0]


def test_embeddings_that_peft_adds_to_the_file_are_taken(tmp_path: Path) -> None:
    model = llama()
    theirs: Any = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    theirs.base_model.model.model.embed_tokens.base_layer.weight.data.mul_(2)
    theirs.base_model.model.model.embed_tokens.lora_embedding_B["default"].data.fill_(0.5)
    theirs.eval().save_pretrained(str(tmp_path))
    ours = restore(model, tmp_path)

    assert torch.equal(
        ours.layers["model.embed_tokens"].base_layer.weight,
        theirs.base_model.model.model.embed_tokens.base_layer.weight,
    )
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


Change = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t["q.lora_A.weight"].fill_(float("nan")),
            "base_model.model.q.lora_A.weight holds 8 values that are",
        ),
        (lambda t: rename(t, "q.", "p."), "the model has no p"),
        (lambda t: rename(t, "q.", "norm."), "norm is no adaptable layer: it is of type LayerNorm"),
        (lambda t: rename(t, "q.", "head."), "head cannot have an adapter and be in modules_to_save ('head',)"),
        (
            lambda t: rename(t, "q.", "block.q."),
            "block.q: factors must be a (2, 4) and b (6, 2) here, got a (2, 4) and b",
        ),
        (lambda t: rename(t, "q.", "line."), "line: a Conv1d has no factors of such shapes"),
        (lambda t: t.pop("head.bias"), "there is no head.bias, which modules_to_save ('head',) wants"),
        (
            lambda t: t.update({"head.bias": torch.ones(4)}),
            "head.bias (4,) does not fit the model: it is of shape (5,)",
        ),
        (lambda t: t.update({"head.gain": torch.ones(5)}), "head.gain (5,) does not fit the model: it is not there"),
        (lambda t: t["head.bias"].fill_(1e300), "torch.float32 cannot hold head.bias"),
        (lambda t: t["q.lora_B.weight"].fill_(1e300), "q: torch.float32 cannot hold factor b: it has the value 1e+300"),
    ],
)
def test_a_file_that_does_not_fit_the_model_changes_nothing(change: Change, message: str, tmp_path: Path) -> None:
    save(drawn(Small(), ["q"], modules_to_save=["head"]), tmp_path)
    file, prefix = tmp_path / "adapter_model.safetensors", "base_model.model."
    tensors = {key.removeprefix(prefix): value for key, value in load_file(file).items()}
    change(tensors)
    save_file({prefix + key: value for key, value in tensors.items()}, file)
    model = Small().float()
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    with pytest.raises(ValueError, match=r".") as caught:
        restore(model, tmp_path)

    assert str(caught.value).startswith(f"{tmp_path}: {message}")
    assert list(model.modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def rename(tensors: dict[str, Tensor], old: str, new: str) -> None:
    for key in [key for key in tensors if key.startswith(old)]:
        tensors[new + key.removeprefix(old)] = tensors.pop(key)


def test_trained_biases_are_not_offered(tmp_path: Path) -> None:
    get_peft_model(Small(), LoraConfig(target_modules=["q"], bias="all")).save_pretrained(str(tmp_path))
    with pytest.raises(NotImplementedError, match=r": no biases are trained here, got bias 'all'$"):
        restore(Small(), tmp_path)


def test_a_layer_by_two_names_has_one_adapter_on_disk_too(tmp_path: Path) -> None:
    def twice() -> Small:
        model = Small()
        model.block["xq"] = model.block["q"]
        return model

    adapted = drawn(twice(), ["block.q", "block.xq"])
    save(adapted, tmp_path)
    assert restore(twice(), tmp_path).layers.keys() == {"block.q", "block.xq"}
    file, refusal = (
        tmp_path / "adapter_config.json",
        r"block\.xq: the layer has another name in the model, and another ",
    )
    text = file.read_text()
    file.write_text(json.dumps(json.loads(text) | {"alpha_pattern": {"xq": 5}}))
    with pytest.raises(ValueError, match=refusal):
        restore(twice(), tmp_path)
    file.write_text(text)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.block.xq.lora_B.weight"] += 1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=refusal):
        restore(twice(), tmp_path)
