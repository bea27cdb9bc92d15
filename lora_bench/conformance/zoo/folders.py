"""Bugs of folders: adapters that are written wrongly, misread, or lost as the model that reads them is merged."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_bench.adapter import read, write
from lora_bench.conformance.zoo.planting import Specimen, bug, specimens
from lora_bench.reference.model import adapt, restore, save
from lora_bench.spec import Factors, LoraSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_bench.adapter import Adapted
    from lora_bench.subject import Subject


def saving(change: Callable[[str, Adapted], Adapted | None]) -> Subject:
    """The reference, saving other adapters than the model has."""

    def changed(model: Any, folder: str) -> None:
        save(model, folder)
        edit(folder, change)

    return bug(save=changed)


def edit(folder: str, change: Callable[[str, Adapted], Adapted | None], **fields: Any) -> None:
    """Write a folder anew with a change made to each of its adapters; None leaves one out."""
    adapter = read(folder)
    modules = {path: new for path, one in adapter.modules.items() if (new := change(path, one)) is not None}
    write(folder, replace(adapter, modules=modules, **fields))


def restoring(change: Callable[[Any], object]) -> Subject:
    """The reference with something done to each model that it restores."""

    def changed(model: nn.Module, folder: str) -> object:
        made = restore(model, folder)
        change(made)
        return made

    return bug(restore=changed)


def another_alpha(_path: str, one: Adapted) -> Adapted:
    return replace(one, spec=replace(one.spec, alpha=one.spec.alpha + 1))


def scaled(scaling: Callable[[LoraSpec], float]) -> Callable[[Any], None]:
    """Another scaling of each layer."""

    def change(model: Any) -> None:
        for layer in model.layers.values():
            layer.scaling = scaling(layer.spec)
            layer.settle()

    return change


def one_for_all(model: Any) -> None:
    """The first layer's scaling for all."""
    (first, *_) = model.layers.values()
    scaled(lambda _: first.spec.scaling)(model)


def zeroed(model: Any, places: slice = slice(None)) -> None:
    """Some of the adapters stay zero."""
    for layer in list(model.layers.values())[places]:
        layer.load(layer.factors.map(torch.zeros_like))


def without_bias(model: Any) -> None:
    for layer in model.layers.values():
        if layer.lora_bias is not None:
            nn.init.zeros_(layer.lora_bias)


def half_frozen(model: Any) -> None:
    (layer, *_) = model.layers.values()
    layer.lora_A.requires_grad_(False)


def sharing() -> Subject:
    """Every restored model has the parameters of the last."""
    last: list[Any] = []

    def change(model: Any) -> None:
        for older in last:
            for name, layer in older.layers.items():
                if name in model.layers and layer.lora_A.shape == model.layers[name].lora_A.shape:
                    layer.load(model.layers[name].factors)
        last[:] = [model]

    return restoring(change)


def remembering() -> Subject:
    """Reads a folder of the same name once."""
    known: dict[str, Any] = {}

    def remembered(model: nn.Module, folder: str) -> object:
        made = restore(model, folder)
        if folder in known and all(
            layer.lora_A.shape == made.layers[name].lora_A.shape for name, layer in known[folder].layers.items()
        ):
            for name, layer in known[folder].layers.items():
                made.layers[name].load(layer.factors)
        known[folder] = made
        return made

    return bug(restore=remembered)


def off_for_good(model: Any, enabled: bool) -> None:
    model.enable(enabled)
    if not enabled and hasattr(model, "layers"):
        zeroed(model)


def some_off(model: Any, enabled: bool) -> None:
    """The first layer's adapter goes on acting."""
    if hasattr(model, "layers"):
        for layer in list(model.layers.values())[1:]:
            layer.enable(enabled)
    else:
        model.enable(enabled)


def merged_with(scale: float) -> Subject:
    def merge_and_unload(model: Any) -> Any:
        if hasattr(model, "layers"):
            for layer in list(model.layers.values())[:1]:
                layer.scaling *= scale
                layer.settle()
        return model.merge_and_unload()

    return bug(merge_and_unload=merge_and_unload)


def into_what_is_shared(model: Any) -> Any:
    """Writes the merged weight where the old one was, for all that share it."""
    if not hasattr(model, "layers"):
        return model.merge_and_unload()
    before = {name: layer.base_layer.weight for name, layer in model.layers.items()}
    plain = model.merge_and_unload()
    with torch.no_grad():
        for name, weight in before.items():
            weight.copy_(plain.get_submodule(name).weight)
            plain.get_submodule(name).weight = weight
    return plain


def originals_act(model: Any) -> None:
    """Modules to save are read and not used."""
    for copied in model.copies.values():
        copied.copy = copy.deepcopy(copied.original)


def copies_lost(model: Any, folder: str) -> None:
    save(model, folder)
    edit(folder, lambda _path, one: one, saved={}, modules_to_save=())


def merged_away(model: Any) -> None:
    """Merges, and forgets the adapter."""
    model.merge()
    for layer in getattr(model, "layers", {}).values():
        nn.init.zeros_(layer.lora_B)


def copies_stay(model: Any) -> Any:
    """Unloads without the modules to save."""
    for copied in getattr(model, "copies", {}).values():
        copied.copy = copied.original
    return model.merge_and_unload()


def shrugging(model: nn.Module, folder: str) -> object:
    """Takes whatever is wrong with a folder for an empty adapter."""
    try:
        return restore(model, folder)
    except (ValueError, OSError):
        made = adapt(model, LoraSpec(1, 1.0), ["q_proj"])
        zeroed(made)
        return made


MISFITS = tuple(
    f"model.{name}"
    for name in (
        "foreign_keys_are_refused",
        "missing_parts_are_refused",
        "other_shapes_are_refused",
        "a_truncated_file_is_refused",
        "unknown_fields_are_refused",
    )
)

SPECIMENS = (
    *specimens(
        "model.writes_peft_folders",
        another_alpha=saving(another_alpha),
        one_layer_is_lost=saving(lambda path, one: one if "0" in path else None),
    ),
    *specimens(
        "model.survives_saving",
        nothing_is_applied=(restoring(zeroed), "vllm#55193"),
        one_is_not_applied=restoring(lambda model: zeroed(model, slice(1))),
    ),
    *specimens(
        "model.reads_peft_folders",
        nothing_is_applied=(restoring(zeroed), "diffusers#9950"),
        the_last_is_not_applied=(restoring(lambda model: zeroed(model, slice(-1, None))), "vllm#34186"),
        rslora_is_ignored=(restoring(scaled(lambda spec: spec.alpha / spec.rank)), "vllm#6909"),
        scaled_by_the_root=restoring(scaled(lambda spec: spec.alpha / math.sqrt(spec.rank))),
    ),
    *specimens("model.patterns_are_honoured", one_scaling_for_all=restoring(one_for_all)),
    *specimens("model.keeps_a_bias_of_b", it_is_dropped=restoring(without_bias)),
    *specimens(
        "model.saves_what_it_read",
        rslora_is_forgotten=saving(lambda _path, one: replace(one, spec=replace(one.spec, rslora=False))),
        merged_into_b=saving(lambda _path, one: replace(one, factors=Factors(one.factors.a, 2 * one.factors.b))),
    ),
    *specimens("model.restored_trains_whole", one_is_frozen=(restoring(half_frozen), "microsoft/LoRA#125")),
    *specimens("model.models_do_not_share", the_last_one_is_all=sharing()),
    *specimens("model.nothing_stale_is_restored", the_folder_is_remembered=(remembering(), "vllm#42125")),
    *specimens("model.off_is_the_model", for_good=bug(enable=off_for_good), one_stays_on=bug(enable=some_off)),
    *specimens(
        "model.merges_to_the_definition",
        the_first_is_not_merged=merged_with(0.0),
        the_first_is_merged_twice=merged_with(2.0),
    ),
    *specimens("model.saves_the_adapter_while_merged", it_is_zero_by_then=bug(merge=merged_away)),
    *specimens(
        "model.a_tied_weight_keeps_its_other_place",
        it_is_merged_too=(bug(merge_and_unload=into_what_is_shared), "peft#2018"),
    ),
    *specimens(
        "model.modules_to_save_survive",
        they_are_dropped=restoring(originals_act),
        they_are_not_saved=bug(save=copies_lost),
        they_are_not_unloaded=bug(merge_and_unload=copies_stay),
    ),
    Specimen("model: whatever is wrong is passed over", bug(restore=shrugging), MISFITS, "vllm#34186"),
)
