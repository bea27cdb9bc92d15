"""LoRA through the weight: W + s B A is made at each forward, and the layer multiplies by that alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from lora_bench.conformance.correct.specs import finite, undropped
from lora_bench.spec import Factors
from lora_bench.subject import Subject

if TYPE_CHECKING:
    from lora_bench.spec import LoraSpec


class Sum(nn.Module):
    """A parametrisation, weight -> weight + s B A, for weights of any shape; `turned` where the inputs come first."""

    def __init__(self, weight: Tensor, spec: LoraSpec, *, turned: bool) -> None:
        super().__init__()
        self.scaling, self.turned, self.enabled = finite(spec.scaling), turned, True
        fan_out, fan_in = self.as_matrix(weight).shape
        self.lora_A = nn.Parameter(weight.new_empty(spec.rank, fan_in))
        self.lora_B = nn.Parameter(weight.new_zeros(fan_out, spec.rank))
        nn.init.xavier_normal_(self.lora_A)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T if self.turned else weight.flatten(1)

    def forward(self, weight: Tensor) -> Tensor:
        if not self.enabled:
            return weight
        total = torch.addmm(self.as_matrix(weight), self.lora_B, self.lora_A, alpha=self.scaling)
        return (total.T if self.turned else total).view_as(weight)

    @torch.no_grad()
    def load(self, factors: Factors) -> None:
        factors.fit(len(self.lora_A), self.lora_A.shape[1], self.lora_B.shape[0])
        self.lora_A.copy_(factors.a)
        self.lora_B.copy_(factors.b)


def parametrised(base: nn.Module, spec: LoraSpec) -> nn.Module:
    """The base itself, of which any use of `weight` is of the sum."""
    if getattr(base, "groups", 1) > 1:
        raise NotImplementedError("B A is no grouped kernel")
    weight = base.requires_grad_(False).weight
    assert isinstance(weight, Tensor)
    turned = not isinstance(base, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    parametrize.register_parametrization(base, "weight", Sum(weight, spec, turned=turned))
    return base


def the_sum(layer: Any) -> Sum:
    if not parametrize.is_parametrized(layer, "weight"):
        raise RuntimeError("merged for good: there is no adapter any more")
    found = layer.parametrizations.weight[0]
    assert isinstance(found, Sum)
    return found


def own_weight(layer: Any) -> Tensor:
    weight = layer.parametrizations.weight.original if parametrize.is_parametrized(layer, "weight") else layer.weight
    assert isinstance(weight, Tensor)
    return weight


PARAMETRISED = Subject(
    "parametrised",
    wrap=parametrised,
    load=lambda layer, factors: the_sum(layer).load(factors),
    factors=lambda layer: Factors(the_sum(layer).lora_A, the_sum(layer).lora_B),
    merge=lambda layer: parametrize.remove_parametrizations(layer, "weight"),
    merge_and_unload=lambda layer: parametrize.remove_parametrizations(layer, "weight"),
    enable=lambda layer, enabled: setattr(the_sum(layer), "enabled", enabled),
    weight=own_weight,
    state=lambda layer: the_sum(layer).state_dict(),
    load_state=lambda layer, state: the_sum(layer).load_state_dict(state),
    layers=("linear", "fan_in_fan_out", "embedding", "conv1d", "conv2d", "conv3d"),
    supports=undropped,
)


class Rebuilt(nn.Module):
    """y = x (W + (B A) s)ᵀ + b; merged in place and unmerged by subtraction."""

    def __init__(self, original: nn.Linear, spec: LoraSpec) -> None:
        super().__init__()
        self.original = original.requires_grad_(False)
        weight = original.weight
        self.lora_up = nn.Parameter(weight.new_zeros(original.out_features, spec.rank))
        self.lora_down = nn.Parameter(weight.new_empty(spec.rank, original.in_features))
        nn.init.normal_(self.lora_down, std=1 / math.sqrt(original.in_features))
        self.scale = spec.scaling
        self.multiplier, self.merged = 1.0, 0.0

    def diff(self, multiplier: float) -> Tensor:
        scale = self.lora_up.new_tensor(self.scale)  # as narrow as the factors
        return (self.lora_up @ self.lora_down) * scale * multiplier

    def forward(self, x: Tensor) -> Tensor:
        weight = self.original.weight
        if not self.merged and self.multiplier:
            weight = weight + self.diff(self.multiplier)
        return functional.linear(x, weight, self.original.bias)

    @torch.no_grad()
    def load(self, factors: Factors) -> None:
        factors.fit(self.lora_down.shape[0], self.original.in_features, self.original.out_features)
        self.onfly_restore()
        self.lora_down.copy_(factors.a)
        self.lora_up.copy_(factors.b)

    @torch.no_grad()
    def onfly_merge(self, factor: float = 1.0) -> None:
        if not self.merged and self.multiplier:
            self.merged = self.multiplier * factor
            self.original.weight += self.diff(self.merged)

    @torch.no_grad()
    def onfly_restore(self) -> None:
        if self.merged:
            self.original.weight -= self.diff(self.merged)
            self.merged = 0.0

    def set_multiplier(self, multiplier: float) -> None:
        self.onfly_restore()
        self.multiplier = float(multiplier)


def merge_to(layer: Rebuilt) -> nn.Linear:
    layer.onfly_merge()
    return layer.original


REBUILT = Subject(
    "rebuilt",
    wrap=Rebuilt,
    load=Rebuilt.load,
    factors=lambda layer: Factors(layer.lora_down, layer.lora_up),
    merge=Rebuilt.onfly_merge,
    unmerge=Rebuilt.onfly_restore,
    merge_and_unload=merge_to,
    merge_scaled=Rebuilt.onfly_merge,
    enable=Rebuilt.set_multiplier,
    scale=Rebuilt.set_multiplier,
    weight=lambda layer: layer.original.weight,
    state=lambda layer: {"lora_up.weight": layer.lora_up, "lora_down.weight": layer.lora_down},
    supports=undropped,
)
