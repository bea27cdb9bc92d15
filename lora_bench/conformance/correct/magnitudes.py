"""DoRA through the weight: V = W + s B A is made at each forward, and its rows are brought to lengths that train."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_bench.conformance.correct.specs import undropped
from lora_bench.spec import Factors
from lora_bench.subject import Subject

if TYPE_CHECKING:
    from lora_bench.spec import LoraSpec


class Decomposed(nn.Module):
    """y = x (m V / ||V||)ᵀ + b, the lengths ||V|| being constants to the gradient; without DoRA y = x Vᵀ + b."""

    def __init__(self, linear: nn.Linear, spec: LoraSpec) -> None:
        super().__init__()
        self.linear, self.scaling = linear.requires_grad_(False), spec.scaling
        weight = linear.weight
        self.a = nn.Parameter(weight.new_empty(spec.rank, linear.in_features).normal_(std=0.5))
        self.b = nn.Parameter(weight.new_zeros(linear.out_features, spec.rank))
        self.m = nn.Parameter(weight.detach().norm(dim=1)) if spec.dora else None
        self.on = True
        self.stored: Tensor | None = None

    def weight(self) -> Tensor:
        if not self.on or self.stored is not None:
            return self.linear.weight
        total = self.linear.weight + self.b @ (self.a * self.scaling)
        if self.m is None:
            return total
        return total * (self.m / total.detach().norm(dim=1)).unsqueeze(1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight(), self.linear.bias)

    @torch.no_grad()
    def load(self, factors: Factors) -> None:
        factors.fit(len(self.a), self.linear.in_features, self.linear.out_features)
        self.unmerge()
        self.a.copy_(factors.a)
        self.b.copy_(factors.b)
        if self.m is not None and factors.magnitude is not None:
            self.m.copy_(factors.magnitude)

    @torch.no_grad()
    def merge(self) -> None:
        if self.stored is None:
            merged = self.weight()
            self.stored = self.linear.weight.clone()
            self.linear.weight.copy_(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.stored is not None:
            self.linear.weight.copy_(self.stored)
            self.stored = None

    def enable(self, enabled: bool) -> None:
        self.unmerge()
        self.on = enabled

    def state(self) -> dict[str, Tensor]:
        held = {"a": self.a, "b": self.b} | ({} if self.m is None else {"m": self.m})
        return {name: value.detach() for name, value in held.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.load_state_dict(self.state_dict() | state)


DECOMPOSED = Subject(
    "decomposed",
    wrap=Decomposed,
    load=Decomposed.load,
    factors=lambda layer: Factors(layer.a, layer.b, magnitude=layer.m),
    merge=Decomposed.merge,
    unmerge=Decomposed.unmerge,
    enable=Decomposed.enable,
    weight=lambda layer: layer.linear.weight,
    state=Decomposed.state,
    load_state=Decomposed.load_state,
    supports=undropped,
    variants=("dora",),
)
