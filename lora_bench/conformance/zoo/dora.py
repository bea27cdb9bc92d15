"""Bugs of DoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_bench.conformance.zoo.planting import alter, original, specimens, wrapped
from lora_bench.reference.layer import LoraLinear

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_bench.subject import Subject


def decomposed(change: Callable[[Any], object]) -> Subject:
    """The reference with something done to each layer with DoRA once it is wrapped."""
    return wrapped(lambda layer: change(layer) if layer.spec.dora else None, layers=("linear",))


def altered(**members: Any) -> Subject:
    """The reference, its class for DoRA with other members."""
    return decomposed(lambda layer: alter(layer, **members))


def plain(layer: Any, x: Tensor) -> Tensor:
    y: Tensor = LoraLinear.forward(layer, x)
    return y


def scaling_the_bias(layer: Any, x: Tensor) -> Tensor:
    y: Tensor = layer.direction_scale() * plain(layer, x)
    return y


def of_the_base(layer: Any) -> Tensor:
    norm: Tensor = layer.base_weight().norm(dim=1)
    return norm


def with_its_gradient(layer: Any) -> Tensor:
    weight = layer.base_weight() + layer.scaling * layer.lora_B @ layer.lora_A
    norm: Tensor = weight.norm(dim=1)
    return norm


def unmagnified(layer: Any, scalings: Any = None) -> Tensor:
    weight: Tensor = LoraLinear.merged_weight(layer, scalings)
    return weight


def half_restored(layer: Any) -> None:
    """What is taken out is the delta, and the factor stays in the weight."""
    c = layer.direction_scale().detach()[:, None]
    weight = layer._unmerged_weight  # noqa: SLF001
    original(layer).unmerge(layer)
    if weight is not None:
        with torch.no_grad():
            layer.base_layer.weight.mul_(c)


SPECIMENS = (
    *specimens(
        "dora.is_identity", the_magnitude_is_one=decomposed(lambda layer: nn.init.ones_(layer.lora_magnitude_vector))
    ),
    *specimens(
        "dora.matches_definition",
        the_magnitude_is_ignored=altered(forward=plain),
        the_bias_is_scaled_too=altered(forward=scaling_the_bias),
        the_norm_is_that_of_the_base=altered(weight_norm=of_the_base),
    ),
    *specimens(
        "dora.trains",
        the_magnitude_is_frozen=(
            decomposed(lambda layer: layer.lora_magnitude_vector.requires_grad_(False)),
            "torchtune#2250",
        ),
    ),
    *specimens("dora.gradients_match_formulas", through_the_norm=altered(weight_norm=with_its_gradient)),
    *specimens("dora.merged_equals_definition", the_magnitude_is_ignored=altered(merged_weight=unmagnified)),
    *specimens(
        "dora.weight_becomes_the_definition",
        nothing_is_written=altered(merge=lambda _layer, *_given, **_options: None),
        the_magnitude_is_ignored=altered(merged_weight=unmagnified),
    ),
    *specimens("dora.unmerge_restores", the_factor_stays=altered(unmerge=half_restored)),
    *specimens("dora.unloaded_equals_definition", the_magnitude_is_ignored=altered(merged_weight=unmagnified)),
)
