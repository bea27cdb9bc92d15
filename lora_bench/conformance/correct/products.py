"""LoRA by other matrix products: the scale shared out between the factors, the base and the adapter in one product."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_bench.conformance.correct.specs import finite, undropped
from lora_bench.spec import Factors
from lora_bench.subject import Subject

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_bench.spec import LoraSpec


class Balanced(nn.Module):
    """y = base(x) + up(down(x)), what trains being down = sqrt(s) A and up = sqrt(s) B; unmerges by subtraction."""

    def __init__(self, base: nn.Linear, spec: LoraSpec) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.dropout = nn.Dropout(spec.dropout)
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.down = nn.Linear(base.in_features, spec.rank, bias=False, **like)
        self.up = nn.Linear(spec.rank, base.out_features, bias=False, **like)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)
        self.root, self.sign = math.sqrt(abs(spec.scaling)), math.copysign(1.0, spec.scaling)
        self.merged = 0.0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self.merged:
            return y
        adapted: Tensor = self.up(self.down(self.dropout(x)))
        return adapted + y

    @torch.no_grad()
    def load(self, factors: Factors) -> None:
        factors.fit(self.down.out_features, self.base.in_features, self.base.out_features)
        if self.merged:
            raise RuntimeError("merged: the weight holds the factors that are in place")
        self.down.weight.copy_(factors.a * self.root)
        self.up.weight.copy_(factors.b * (self.root * self.sign))

    @torch.no_grad()
    def merge(self, factor: float = 1.0) -> None:
        if not self.merged:
            self.base.weight.addmm_(self.up.weight, self.down.weight, alpha=factor)
            self.merged = factor

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.merged:
            self.base.weight.addmm_(self.up.weight, self.down.weight, alpha=-self.merged)
            self.merged = 0.0


def unload(layer: Balanced) -> nn.Linear:
    layer.merge()
    return layer.base


BALANCED = Subject(
    "balanced",
    wrap=Balanced,
    load=Balanced.load,
    merge=Balanced.merge,
    unmerge=Balanced.unmerge,
    merge_and_unload=unload,
    merge_scaled=Balanced.merge,
    weight=lambda layer: layer.base.weight,
)


class Stacked(nn.Module):
    """[y₀ ; h] = [W ; A] x in one product, then y = y₀ + s B h in another; in evaluation y = [W | s B] [x ; A x]."""

    def __init__(self, base: nn.Linear, spec: LoraSpec) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.rank, self.scaling = spec.rank, finite(spec.scaling)
        self.enabled = True
        weight = base.weight
        self.lora_A = nn.Parameter(weight.new_empty(spec.rank, base.in_features).normal_(0, 0.02))
        self.lora_B = nn.Parameter(weight.new_zeros(base.out_features, spec.rank))
        self.unmerged: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled or self.unmerged is not None:
            y: Tensor = self.base_layer(x)
            return y
        weight, bias, rows = self.base_layer.weight, self.base_layer.bias, x.reshape(-1, x.shape[-1])
        if self.training:
            padded = None if bias is None else functional.pad(bias, (0, self.rank))
            both = functional.linear(rows, torch.cat([weight, self.lora_A]), padded)
            of_base, hidden = both.split([len(weight), self.rank], dim=-1)
            y = torch.addmm(of_base, hidden, self.lora_B.mT, alpha=self.scaling)
        else:
            beside = torch.cat([rows, rows @ self.lora_A.mT], dim=-1)
            y = functional.linear(beside, torch.cat([weight, self.scaling * self.lora_B], dim=1), bias)
        return y.unflatten(0, x.shape[:-1]) if x.ndim > 1 else y[0]

    @torch.no_grad()
    def load(self, factors: Factors) -> None:
        factors.fit(self.rank, self.base_layer.in_features, self.base_layer.out_features)
        if self.unmerged is not None:
            raise RuntimeError("unmerge before loading")
        self.lora_A.copy_(factors.a)
        self.lora_B.copy_(factors.b)

    def state(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.named_parameters() if name.startswith("lora_")}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.load_state_dict(self.state_dict() | state)

    def enable(self, enabled: bool) -> None:
        self.unmerge()
        self.enabled = enabled

    def merge(self) -> None:
        """Exchange the base's parameter for another, so that whoever shares it keeps the old one."""
        if self.enabled and self.unmerged is None:
            self.unmerged = self.base_layer.weight
            merged = self.unmerged.addmm(self.lora_B, self.lora_A, alpha=self.scaling)
            self.base_layer.weight = nn.Parameter(merged.detach(), requires_grad=False)

    def unmerge(self) -> None:
        if self.unmerged is not None:
            self.base_layer.weight = nn.Parameter(self.unmerged, requires_grad=False)
            self.unmerged = None


class Tower(NamedTuple):
    """All adapters as one of rank ΣR: A (ΣR, k), s B (d, ΣR), and whose each rank is, (ΣR,)."""

    a: Tensor
    b: Tensor
    owner: Tensor


def pool_of_ranks(layer: Stacked, adapters: Sequence[tuple[LoraSpec, Factors]]) -> Tower:
    for spec, factors in adapters:
        factors.fit(spec.rank, layer.base_layer.in_features, layer.base_layer.out_features)
    return Tower(
        torch.cat([factors.a.detach() for _, factors in adapters]),
        torch.cat([spec.scaling * factors.b.detach() for spec, factors in adapters], dim=1),
        torch.cat([torch.full((spec.rank,), index) for index, (spec, _) in enumerate(adapters)]),
    )


def route_by_mask(layer: Stacked, pool: Tower, x: Tensor, ids: Tensor) -> Tensor:
    """Every row goes through every adapter, and all but its own ranks are taken for zero."""
    if len(ids) and not -1 <= int(ids.min()) <= int(ids.max()) <= int(pool.owner.max()):
        raise IndexError(f"adapter ids must be in -1 .. {int(pool.owner.max())}, got {ids.tolist()}")
    if layer.unmerged is not None:
        raise RuntimeError("unmerge before routing")
    foreign = ids[:, None] != pool.owner
    hidden = (x @ pool.a.mT).masked_fill(foreign if x.ndim == 2 else foreign[:, None], 0)
    y: Tensor = layer.base_layer(x)
    return y + hidden @ pool.b.mT


STACKED = Subject(
    "stacked",
    wrap=Stacked,
    load=Stacked.load,
    factors=lambda layer: Factors(layer.lora_A, layer.lora_B),
    merge=Stacked.merge,
    unmerge=Stacked.unmerge,
    enable=Stacked.enable,
    weight=lambda layer: layer.base_layer.weight,
    state=Stacked.state,
    load_state=Stacked.load_state,
    pool=pool_of_ranks,
    route=route_by_mask,
    supports=undropped,
)
