"""Bugs of merging and unmerging."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_bench.conformance.zoo.planting import altered, bug, original, specimens
from lora_bench.reference.kinds import LoraEmbedding
from lora_bench.spec import Factors


def adding(change: Any) -> Any:
    """A merge that adds something else: `change` gives the factors and the scaling to add."""
    return altered(plus=lambda layer, weight, *own: original(layer).plus(layer, weight, *change(*own)))


def turned(layer: Any, weight: Tensor, factors: Factors, scaling: float) -> Tensor:
    """B A is transposed where its shape does not say so."""
    zero: Tensor = original(layer).plus(layer, torch.zeros_like(weight), factors, scaling)
    square = zero.ndim == 2 and zero.shape[0] == zero.shape[1]
    return weight + (zero.T if square else zero)


def narrow(factors: Factors, scaling: float) -> tuple[Factors, float]:
    return factors.map(lambda own: own.bfloat16().to(own.dtype)), scaling


def without_bias(layer: Any) -> Any:
    unloaded = layer.merge_and_unload()
    unloaded.bias = torch.zeros_like(unloaded.bias) if unloaded.bias is not None else None
    return unloaded


def wide(layer: Any) -> Any:
    """A merged layer whose output is float32 whatever its base is."""
    unloaded = layer.merge_and_unload()
    return lambda x: unloaded(x).float()


@torch.no_grad()
def again(layer: Any) -> None:
    """Adds the adapter each time that it is asked to."""
    if layer.merged:
        scalings = layer.merged_at
        layer.base_layer.weight.copy_(layer.plus(layer.base_layer.weight, layer.factors, next(iter(scalings.values()))))
    else:
        layer.merge()


def leaving_some(layer: Any) -> None:
    """What is taken out is a little less than what was put in."""
    if layer.merged:
        merged = layer.base_layer.weight.detach().clone()
        layer.unmerge()
        with torch.no_grad():
            weight = layer.base_layer.weight
            weight.add_((merged - weight) * 2**-30)


def scaled_in_place(layer: Any) -> None:
    """The scale is folded into B and stays there."""
    layer.merge()
    with torch.no_grad():
        layer.lora_B.mul_(2)
    layer.scaling /= 2


def remembering(layer: Any) -> None:
    """What is merged is what was merged the first time."""
    layer.first = getattr(layer, "first", None) or copy.deepcopy(layer.factors.map(Tensor.detach))
    now = layer.factors.map(lambda own: own.detach().clone())
    layer.load(layer.first)
    layer.merge()
    with torch.no_grad():
        layer.lora_A.copy_(layer.shaped(now)[0])
        layer.lora_B.copy_(layer.shaped(now)[1])


def left_scaled(layer: Any, factor: float) -> None:
    """The adapter keeps the scale that it was merged at."""
    layer.merge(factor=factor)
    layer.scaling = factor * layer.spec.scaling


def by_what_is_there_now(layer: Any) -> None:
    """Subtracts the factors of now, which need not be those that were merged."""
    if not layer.merged:
        return
    scaling = next(iter(layer.merged_at.values()))
    less = layer.plus(layer.base_layer.weight.detach(), layer.factors.map(Tensor.detach), -scaling)
    layer.unmerge()
    with torch.no_grad():
        layer.base_layer.weight.copy_(less)


def loaded_while_merged(layer: Any, factors: Factors) -> None:
    with torch.no_grad():
        for own, new in zip((layer.lora_A, layer.lora_B), layer.shaped(factors), strict=True):
            own.copy_(new)
        if layer.lora_bias is not None and factors.bias is not None:
            layer.lora_bias.copy_(factors.bias)


def off_for_good(layer: Any, enabled: bool) -> None:
    """What was off once does not come on again."""
    layer.enable(enabled and layer.enabled)


def unscaled_bias(layer: Any) -> Any:
    unloaded = layer.merge_and_unload()
    beta = layer.lora_bias
    if beta is not None and not isinstance(layer, LoraEmbedding):
        unloaded.bias = nn.Parameter(unloaded.bias + (1 - layer.scaling) * beta, requires_grad=False)
    return unloaded


def base_biased_for_good(layer: Any) -> None:
    """The adapter's bias stays in the base's."""
    if layer.merged and layer.lora_bias is not None:
        bias = layer.base_layer.bias.detach().clone()
        layer.unmerge()
        with torch.no_grad():
            layer.base_layer.bias.copy_(bias)
    else:
        layer.unmerge()


def dropped_bias(layer: Any, hidden: Tensor, adapter: Any, _bias: Tensor | None) -> Tensor:
    y: Tensor = original(layer).outward(layer, hidden, adapter, None)
    return y


def unscaled_in_forward(layer: Any, hidden: Tensor, adapter: Any, bias: Tensor | None) -> Tensor:
    y: Tensor = original(layer).outward(layer, hidden, adapter, None if bias is None else bias / adapter.scaling)
    return y


def detached_bias(layer: Any, hidden: Tensor, adapter: Any, bias: Tensor | None) -> Tensor:
    y: Tensor = original(layer).outward(layer, hidden, adapter, None if bias is None else (bias + bias.detach()) / 2)
    return y


MATRICES = ("linear", "fan_in_fan_out", "embedding")
"""The kinds whose weight may be square."""

SPECIMENS = (
    *specimens("merge.keeps_dtype", fp32_comes_out=bug(merge=wide)),
    *specimens("merge.keeps_bias", the_bias_is_lost=bug(merge=without_bias)),
    *specimens(
        "merge.equals_definition",
        the_sign_is_wrong=adding(lambda factors, scaling: (factors, -scaling)),
        there_is_no_scale=adding(lambda factors, _: (factors, 1.0)),
        transposed_where_square=(replace(altered(plus=turned), layers=MATRICES), "peft#3532"),
        the_adapter_is_in_bf16=(adding(narrow), "peft#1388, NeMo-RL#3696"),
        the_last_rank_is_dropped=adding(
            lambda factors, scaling: (Factors(factors.a[:-1], factors.b[:, :-1], factors.bias), scaling)
        ),
    ),
    *specimens("merge.equals_separate", the_adapter_is_dropped=bug(merge=lambda layer: layer.base_layer)),
    *specimens(
        "merge.weight_becomes_w_plus_sba",
        nothing_is_written=bug(merge=lambda _layer: None),
        another_sign=adding(lambda factors, scaling: (factors, -scaling)),
    ),
    *specimens("merge.twice_is_once", twice_is_twice=bug(merge=again)),
    *specimens(
        "merge.unmerge_restores",
        nothing_is_restored=bug(unmerge=lambda _layer: None),
        the_adapter_is_lost=bug(unmerge=lambda layer: (layer.unmerge(), layer.enable(False))),
        a_part_is_left=bug(unmerge=leaving_some),
    ),
    *specimens("merge.cycles_do_not_drift", a_part_is_left_each_time=bug(unmerge=leaving_some)),
    *specimens("merge.leaves_the_factors", the_scale_is_folded_into_b=bug(merge=scaled_in_place)),
    *specimens("merge.after_loading_others", what_was_merged_first=(bug(merge=remembering), "vllm#42125")),
    *specimens(
        "merge.scaled_merges_and_unmerges",
        the_factor_is_ignored=bug(merge_scaled=lambda layer, _factor: layer.merge()),
        the_adapter_stays_scaled=bug(merge_scaled=left_scaled),
    ),
    *specimens(
        "merge.and_unload_equals_definition",
        it_is_the_base=bug(merge_and_unload=lambda layer: layer.base_layer),
        the_delta_is_added_twice=bug(
            merge_and_unload=lambda layer: (layer.merge(), layer.merge_and_unload(), again(layer), layer.base_layer)[-1]
        ),
    ),
    *specimens(
        "lora_bias.matches_definition",
        it_is_dropped=altered(outward=dropped_bias),
        it_is_not_scaled=altered(outward=unscaled_in_forward),
    ),
    *specimens("lora_bias.gradient_matches_formula", half_of_it=altered(outward=detached_bias)),
    *specimens("lora_bias.merged_equals_definition", it_is_not_scaled=(bug(merge=unscaled_bias), "peft#3741")),
    *specimens("lora_bias.merged_bias_is_scaled", it_is_not_scaled=(bug(merge=unscaled_bias), "peft#3741")),
    *specimens("lora_bias.unmerge_restores", it_stays_in_the_base=bug(unmerge=base_biased_for_good)),
    *specimens(
        "lifecycle.any_order",
        unmerged_by_other_factors=bug(load=loaded_while_merged, unmerge=by_what_is_there_now),
        merged_again_at_each_merge=bug(merge=again),
        off_is_for_good=bug(enable=off_for_good),
    ),
)
