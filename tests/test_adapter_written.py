"""PEFT's adapter folder: what we write, PEFT computes with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_bench.adapter import Adapted, Adapter, read, write
from lora_bench.spec import Factors, LoraSpec
from tests.peft_folders import (
    Many,
    configured,
    drawn,
    layer,
    loaded_by_peft,
    made,
    marks,
    refused,
)

pytestmark = marks


def delta(one: Adapted) -> Tensor:
    """s B A, (d_out, d_in)."""
    return one.spec.scaling * one.factors.b @ one.factors.a


def grouped(one: Adapted, conv: nn.Conv2d) -> Tensor:
    """The weight of a convolution without groups that computes s B A: lora_A sees all channels, whatever the groups."""
    return delta(one).view(conv.out_channels, -1, *one.kernel)


@pytest.mark.parametrize(
    "spec",
    [LoraSpec(2, 3.0), LoraSpec(4, 6.0, rslora=True), LoraSpec(2, 3.0, lora_bias=True), LoraSpec(2, 1.0, dropout=0.5)],
    ids=str,
)
def test_peft_computes_the_definition_of_a_linear_layer_that_we_wrote(spec: LoraSpec, tmp_path: Path) -> None:
    model, one, x = Many(), made(spec, 5, 4), drawn(3, 5)
    wanted = model.lin(x) + x @ delta(one).T
    if one.factors.bias is not None:
        wanted += spec.scaling * one.factors.bias
    write(tmp_path, Adapter({"lin": one}))

    assert torch.equal(layer(loaded_by_peft(tmp_path, model), "lin")(x), wanted)


def test_peft_computes_the_definition_of_other_kinds_that_we_wrote(tmp_path: Path) -> None:
    model, spec = Many(), LoraSpec(2, 3.0)
    table, line = made(spec, 7, 5, embedding=True), made(spec, 9, 2, kernel=(3,))
    conv = made(spec, 24, 6, kernel=(3, 2), groups=2)
    ids, signal, image = torch.tensor([6, 0, 6]), drawn(2, 3, 5), drawn(2, 4, 5, 5)
    wanted = {
        "table": model.table(ids) + delta(table).T[ids],
        "line": model.line(signal) + functional.conv1d(signal, delta(line).view(2, 3, 3)),
        "conv": model.conv(image) + functional.conv2d(image, grouped(conv, model.conv)),
    }
    write(tmp_path, Adapter({"table": table, "line": line, "conv": conv}))
    theirs = loaded_by_peft(tmp_path, model)

    assert torch.equal(layer(theirs, "table")(ids), wanted["table"])
    assert torch.equal(layer(theirs, "line")(signal), wanted["line"])
    assert torch.equal(layer(theirs, "conv")(image), wanted["conv"])


def test_peft_computes_the_definition_of_a_transposed_layer_that_we_wrote(tmp_path: Path) -> None:
    model, one, x = Many(), made(LoraSpec(2, 3.0), 5, 6), drawn(3, 5)
    wanted = model.turned(x) + x @ delta(one).T
    write(tmp_path, Adapter({"turned": one}, fan_in_fan_out=True))
    theirs = layer(loaded_by_peft(tmp_path, model), "turned")

    assert torch.equal(theirs(x), wanted)
    theirs.merge()
    assert torch.equal(theirs(x), wanted)


def test_peft_finds_the_magnitude_that_we_wrote(tmp_path: Path) -> None:
    spec = LoraSpec(2, 2.0, dora=True)
    modules = {"lin": made(spec, 5, 4), "line": made(spec, 9, 2, kernel=(3,))}
    write(tmp_path, Adapter(modules))
    theirs = loaded_by_peft(tmp_path, Many())

    for path, one in modules.items():
        magnitude = layer(theirs, path).lora_magnitude_vector["default"].weight
        assert one.factors.magnitude is not None
        assert torch.equal(magnitude.flatten(), one.factors.magnitude)
        assert magnitude.shape == ((4,) if path == "lin" else (1, 2, 1))


def test_peft_gives_each_module_its_own_rank_and_alpha(tmp_path: Path) -> None:
    specs = {"lin": LoraSpec(2, 3.0), "wide": LoraSpec(4, 1.5), "head": LoraSpec(2, 8.0), "q": LoraSpec(2, 3.0)}
    model = Many()
    model.q = nn.ModuleDict({"lin": nn.Linear(5, 4), "q": nn.Linear(5, 4)}).double()
    paths = {"lin": "lin", "wide": "wide", "head": "head", "q": "q.q"}
    modules = {
        paths[name]: made(spec, 4 if name == "head" else 5, 3 if name == "head" else 4) for name, spec in specs.items()
    }
    write(tmp_path, Adapter(modules, target_modules="lin|wide|head|q.q"))
    theirs = loaded_by_peft(tmp_path, model)

    for path, one in modules.items():
        assert layer(theirs, path).r == {"default": one.spec.rank}
        assert layer(theirs, path).scaling == {"default": one.spec.scaling}
        assert torch.equal(layer(theirs, path).lora_B["default"].weight, one.factors.b)


def test_a_pattern_is_for_one_module_and_for_none_that_ends_as_it_does(tmp_path: Path) -> None:
    modules = {path: made(LoraSpec(rank, 3.0), 5, 4) for path, rank in (("a.lin", 2), ("b.lin", 2), ("lin", 4))}
    write(tmp_path, Adapter(modules))

    assert {path: one.spec.rank for path, one in read(tmp_path).modules.items()} == {"a.lin": 2, "b.lin": 2, "lin": 4}


def test_peft_takes_a_saved_module_and_biases_as_we_wrote_them(tmp_path: Path) -> None:
    weight, bias, own = drawn(3, 4), drawn(3), drawn(4)
    write(
        tmp_path,
        Adapter(
            {"lin": made(LoraSpec(2, 3.0), 5, 4)},
            modules_to_save=("head",),
            saved={"head.weight": weight, "head.bias": bias, "lin.bias": own},
            bias="lora_only",
        ),
    )
    theirs = loaded_by_peft(tmp_path, Many())
    head = layer(theirs, "head").modules_to_save["default"]

    assert torch.equal(head.weight, weight)
    assert torch.equal(head.bias, bias)
    assert torch.equal(layer(theirs, "lin").base_layer.bias, own)


def test_a_saved_module_may_be_called_lora_something(tmp_path: Path) -> None:
    saved = {"block.lora_head.weight": drawn(3, 4), "block.lora_head.bias": drawn(3)}
    write(tmp_path, Adapter({"lin": made(LoraSpec(2, 3.0), 5, 4)}, modules_to_save=("lora_head",), saved=saved))

    assert read(tmp_path).saved.keys() == saved.keys()
    configured(tmp_path, modules_to_save=None)
    assert "the key 'base_model.model.block.lora_head.bias' ends in none of lora_A.weight" in refused(tmp_path)


def test_parameters_that_share_memory_or_are_not_contiguous_are_written(tmp_path: Path) -> None:
    factors = Factors(drawn(5, 2).T, drawn(2, 4).T)
    one = Adapted(LoraSpec(2, 3.0), Factors(nn.Parameter(factors.a), nn.Parameter(factors.b)))
    write(tmp_path, Adapter({"one": one, "two": one}))

    for again in read(tmp_path).modules.values():
        assert torch.equal(again.factors.a, factors.a)
        assert torch.equal(again.factors.b, factors.b)
