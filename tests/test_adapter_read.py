"""PEFT's adapter folder: what PEFT writes, we read and write again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from lora_bench.adapter import Adapted, read, write
from lora_bench.adapter.config import CHANGES, HARMLESS, USED
from tests.peft_folders import (
    Many,
    layer,
    loaded_by_peft,
    marks,
    whole,
)

pytestmark = marks


def written_by_peft(folder: Path, **config: Any) -> nn.Module:
    """A model of PEFT's with integers for values, saved."""
    model: Any = get_peft_model(Many(), LoraConfig(**config))
    whole(model)
    model.save_pretrained(str(folder))
    return model


def assert_same(one: Adapted, theirs: Any) -> None:
    """The factors that PEFT's layer holds, and its scaling and dropout."""
    if one.embedding:
        a, b = theirs.lora_embedding_A["default"], theirs.lora_embedding_B["default"]
    else:
        a, b = theirs.lora_A["default"].weight.flatten(1), theirs.lora_B["default"].weight.flatten(1)
    assert torch.equal(one.factors.a, a)
    assert torch.equal(one.factors.b, torch.block_diag(*b.chunk(one.groups)))
    assert one.spec.scaling == theirs.scaling["default"]
    assert one.spec.rank == theirs.r["default"]
    assert one.spec.dropout == getattr(theirs.lora_dropout["default"], "p", 0.0)
    if one.factors.magnitude is not None:
        assert torch.equal(one.factors.magnitude, theirs.lora_magnitude_vector["default"].weight.flatten())
    if one.factors.bias is not None:
        assert torch.equal(one.factors.bias, theirs.lora_B["default"].bias)


ALL = ["lin", "wide", "table", "turned", "conv", "line", "attention"]


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ALL, "lora_alpha": 3},
        {"target_modules": ALL, "use_rslora": True, "rank_pattern": {"conv|wide": 4}, "alpha_pattern": {"lin": 5}},
        {"target_modules": ALL[:2], "rank_pattern": {"^wide": 3, "l.n": 6}, "lora_dropout": 0.25},
        {"target_modules": ["attention", "lin"], "rank_pattern": {"attention": 4}, "alpha_pattern": {"attention": 3}},
        {"target_modules": ["lin", "line", "table"], "use_dora": True},
        {"target_modules": ["lin", "line", "turned"], "lora_bias": True},
        {"target_modules": "all-linear", "exclude_modules": ["wide"], "init_lora_weights": "gaussian"},
        {"target_modules": ["lin"], "modules_to_save": ["head"], "bias": "all"},
    ],
    ids=str,
)
def test_we_read_what_peft_holds_and_write_what_it_wrote(config: dict[str, Any], tmp_path: Path) -> None:
    model = written_by_peft(tmp_path / "theirs", r=2, **config)
    adapter = read(tmp_path / "theirs")

    assert adapter.modules
    for path, one in adapter.modules.items():
        assert_same(one, layer(model, path))
    write(tmp_path / "ours", adapter)
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    again = loaded_by_peft(tmp_path / "ours", Many())
    for path, one in adapter.modules.items():
        assert_same(one, layer(again, path))


def test_the_shape_of_a_convolution_is_read_from_its_tensors(tmp_path: Path) -> None:
    written_by_peft(tmp_path, r=4, target_modules=ALL)
    modules = read(tmp_path).modules

    assert (modules["conv"].kernel, modules["conv"].groups) == ((3, 2), 2)
    assert modules["conv"].factors.a.shape == (4, 24)
    assert modules["conv"].factors.b.shape == (6, 4)
    assert (modules["line"].kernel, modules["line"].groups) == ((3,), 1)
    assert [path for path, one in modules.items() if one.embedding] == ["table"]
    assert modules["table"].factors.a.shape == (4, 7)
    assert {path for path, one in modules.items() if not one.kernel} >= {"attention", "attention.base_layer.out_proj"}


def test_every_field_of_pefts_configuration_is_known() -> None:
    fields = LoraConfig().to_dict().keys()

    assert fields <= {*USED, *CHANGES, *HARMLESS}, f"new in peft {peft.__version__}: read what it does, and list it"


def test_what_is_harmless_and_what_beside_the_factors_was_trained_is_kept(tmp_path: Path) -> None:
    written_by_peft(
        tmp_path / "theirs",
        r=2,
        target_modules=r"l.n|wide|turned",
        exclude_modules=["wide"],
        fan_in_fan_out=True,
        bias="all",
        modules_to_save=["head"],
        revision="v2",
    )
    adapter = read(tmp_path / "theirs")
    write(tmp_path / "ours", adapter)
    again = read(tmp_path / "ours")

    assert adapter.target_modules == again.target_modules == r"l.n|wide|turned"
    assert adapter.exclude_modules == again.exclude_modules == ("wide",)
    assert adapter.modules_to_save == again.modules_to_save == ("head",)
    assert adapter.fan_in_fan_out is again.fan_in_fan_out is True
    assert adapter.kept["revision"] == again.kept["revision"] == "v2"
    assert adapter.bias == again.bias == "all"
    assert {"lin.bias", "conv.bias", "head.weight", "head.bias"} <= adapter.saved.keys() == again.saved.keys()
