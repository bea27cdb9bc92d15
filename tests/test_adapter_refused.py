"""PEFT's adapter folder: what is broken is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_bench.adapter import Adapter, non_finite, read, write
from lora_bench.spec import LoraSpec
from tests.expected import exactly
from tests.peft_folders import (
    PREFIX,
    configured,
    drawn,
    made,
    marks,
    refused,
)

pytestmark = marks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    spec = LoraSpec(2, 3.0)
    write(tmp_path, Adapter({"lin": made(spec, 5, 4), "block.wide": made(spec, 5, 4)}))
    return tmp_path


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / name).rename(folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError) as caught:
        read(folder)

    assert str(caught.value).startswith(f"{folder} has no {name}; there is adapter_")
    assert "adapter_model.bin" in str(caught.value)


@pytest.mark.parametrize("size", [0, 443, -2])
def test_a_truncated_file_is_named(size: int, folder: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        whole_file = (folder / name).read_bytes()
        (folder / name).write_bytes(whole_file[: min(size, len(whole_file) - 3)])

        assert refused(folder).startswith(f"{folder / name}: ")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_parameters": ["experts.w"]}, "target_parameters changes what a layer computes, and is ['experts.w']"),
        ({"layer_replication": [[0, 2]]}, "layer_replication changes what a layer computes, and is [[0, 2]]"),
        ({"use_qalora": True}, "use_qalora changes what a layer computes, and is True"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens changes what a layer computes, and is [1]"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora changes what a layer computes, and is {'nblocks': 2}"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices changes what a layer computes, and is [1]"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying changes what a layer computes, and is True"),
        ({"novelty": 0.5}, "novelty is no field that is known, and is 0.5"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights must leave the base alone (True, "),
        ({"peft_type": "LOHA"}, "peft_type must be 'LORA', got 'LOHA'"),
        ({"r": 2.0}, "r must be of type int, got 2.0"),
        ({"r": True}, "r must be of type int, got True"),
        ({"r": 0}, "block.wide: rank must be at least 1, got 0"),
        ({"lora_alpha": float("nan")}, "block.wide: alpha must be finite, got nan"),
        ({"lora_dropout": 1}, "block.wide: dropout must be in [0, 1), got 1"),
        ({"use_rslora": "yes"}, "use_rslora must be of type bool, got 'yes'"),
        ({"target_modules": [1]}, "target_modules must be of type list of str or str or null, got [1]"),
        ({"rank_pattern": {"lin": 1.5}}, "rank_pattern['lin'] must be of type int, got 1.5"),
        ({"alpha_pattern": {"lin": None}}, "alpha_pattern['lin'] must be of type int or float, got None"),
        ({"rank_pattern": {"(": 2}}, "block.wide: the pattern '(' is no regular expression"),
        ({"bias": "some"}, "bias must be one of none, all, lora_only, got 'some'"),
        ({"modules_to_save": ["head"]}, "modules_to_save names 'head', of which there is no tensor"),
    ],
)
def test_a_field_that_is_not_understood_is_named(fields: dict[str, Any], message: str, folder: Path) -> None:
    file = configured(folder, **fields)

    assert refused(folder).startswith(f"{file}: {message}")


def test_a_pattern_is_for_whole_components(folder: Path) -> None:
    configured(
        folder, rank_pattern={"in": 9, "block": 9, "block|ide": 9, "wid": 9}, alpha_pattern={"wide": 5, "lock.*": 9}
    )

    assert {path: one.spec for path, one in read(folder).modules.items()} == {
        "lin": LoraSpec(2, 3.0),
        "block.wide": LoraSpec(2, 5.0),
    }


def test_a_field_that_is_off_is_no_matter(folder: Path) -> None:
    configured(folder, use_qalora=False, target_parameters=[], layer_replication=None, novelty=None, peft_version="9")

    assert read(folder).kept == {"peft_version": "9"}


def test_a_field_that_is_missing_or_there_twice_is_named(folder: Path) -> None:
    file = folder / "adapter_config.json"
    text = file.read_text()
    file.write_text(text.replace('"r": 2', '"r": 2, "r": 4'))
    assert refused(folder) == f"{file}: r is there twice"
    file.write_text(text.replace('"r": 2', '"rank": null'))
    assert refused(folder) == f"{file}: there is no r"
    file.write_text("[]")
    assert refused(folder) == f"{file}: wanted an object of fields, got a list"


A, B = f"{PREFIX}lin.lora_A.weight", f"{PREFIX}lin.lora_B.weight"
Tensors = dict[str, Tensor]


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key.replace(old, new): value for key, value in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {key: t[key] for key in t if key != B}, f"{B} is missing: by adapter_config.json there should be "),
        (lambda t: {key: t[key] for key in t if key != A}, f"{A} is missing"),
        (lambda t: t | {f"{PREFIX}lin.lora_B.bias": drawn(4)}, f"{PREFIX}lin.lora_B.bias is one too many"),
        (
            lambda t: t | {f"{PREFIX}lin.lora_magnitude_vector": drawn(4)},
            f"{PREFIX}lin.lora_magnitude_vector is one too",
        ),
        (lambda t: t | {f"{PREFIX}lin.lora_embedding_A": drawn(2, 5)}, f"{A} is one too many"),
        (
            lambda t: t | {B: drawn(4, 3)},
            f"{A} is of shape (2, 5) and lora_B.weight of shape (4, 3), and adapter_config",
        ),
        (
            lambda t: t | {A: drawn(3, 5), B: drawn(4, 3)},
            f"{A} is of shape (3, 5) and lora_B.weight of shape (4, 3), and",
        ),
        (
            lambda t: t | {B: drawn(4, 1)},
            f"{A} is of shape (2, 5) and lora_B.weight of shape (4, 1), and adapter_config",
        ),
        (lambda t: t | {A: drawn(2)}, f"{A} is of shape (2,) and lora_B.weight of shape (4, 2), and adapter_config"),
        (lambda t: t | {A: drawn(2, 0)}, f"{A} is of shape (2, 0)"),
        (lambda t: t | {A: drawn(2, 5, 3), B: drawn(4, 2, 3)}, f"{A} is of shape (2, 5, 3)"),
        (
            lambda t: t | {A: drawn(2, 5, 3), B: drawn(5, 1, 1)},
            f"{PREFIX}lin: the 2 groups of lora_B do not divide its 5",
        ),
        (lambda t: t | {A: drawn(2, 5).float()}, f"{PREFIX}lin: factors must share a dtype, got a torch.float32 and b"),
        (
            lambda t: t | {A: torch.ones(2, 5).int(), B: torch.ones(4, 2).int()},
            f"{PREFIX}lin: factor a must be of a 16-",
        ),
        (renamed("base_model.model.", "base_model."), "the key 'base_model."),
        (renamed("base_model.model.lin", "lin"), "the key 'lin.lora_"),
        (renamed("lora_A.weight", "lora_A.default.weight"), f"the key '{PREFIX}"),
        (renamed("lora_", "adapter_"), "no key ends in one of lora_A.weight, lora_B.weight, "),
        (
            lambda t: t | {f"{PREFIX}lin.bias": drawn(4), f"{PREFIX}lin.base_layer.bias": drawn(4)},
            f"{PREFIX}lin.bias is there twice",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: Callable[[Tensors], Tensors], message: str, folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)

    assert refused(folder).startswith(f"{file}: {message}")


def test_values_that_are_not_finite_are_read_and_counted(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    assert non_finite(read(folder)) == {}
    tensors[A][0, :2] = torch.tensor([float("nan"), float("inf")])
    tensors[f"{PREFIX}lin.base_layer.bias"] = torch.full((4,), float("-inf"))
    save_file(tensors, file)

    assert non_finite(read(folder)) == {A: 2, f"{PREFIX}lin.base_layer.bias": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": LoraSpec(3, 3.0)}, "the spec's rank is 3, and that of the factors 2"),
        ({"spec": LoraSpec(2, 3.0, dora=True)}, "the spec says dora=True, and the factors lack its vector"),
        ({"spec": LoraSpec(2, 3.0, lora_bias=True)}, "the spec says lora_bias=True, and the factors lack its vector"),
        ({"embedding": True, "kernel": (2,)}, "an embedding has neither a kernel nor a lora_bias"),
        ({"kernel": (4,)}, "a kernel (4,) does not divide factor a of 6 columns"),
        ({"groups": 2}, "only a convolution has groups, got 2 without a kernel"),
        ({"kernel": (2,), "groups": 3}, "3 groups do not divide rank 2 and 4 outputs"),
        ({"kernel": (2,), "groups": 2}, "factor b must be zero outside its 2 groups"),
    ],
)
def test_a_module_that_does_not_fit_together_is_refused(change: dict[str, Any], message: str) -> None:
    one = made(LoraSpec(2, 3.0), 6, 4)
    with pytest.raises(ValueError, match=exactly(message)):
        replace(one, **change)


def test_what_one_configuration_cannot_say_is_refused() -> None:
    one, other = made(LoraSpec(2, 3.0), 6, 4), made(LoraSpec(2, 3.0, rslora=True), 6, 4)
    with pytest.raises(ValueError, match=r"^rslora must be one for all modules, got False, True$"):
        Adapter({"one": one, "other": other})
    with pytest.raises(ValueError, match=r"^an adapter needs at least one adapted module, got none$"):
        Adapter({})
    with pytest.raises(ValueError, match=r"^kept fields must be among .*, got r$"):
        Adapter({"one": one}, kept={"r": 3})
