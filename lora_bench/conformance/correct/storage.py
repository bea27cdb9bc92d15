"""LoRA with its factors kept otherwise: transposed, or as windows of one flat buffer."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from lora_bench.spec import Factors
from lora_bench.subject import Subject

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_bench.spec import LoraSpec


class Projected(nn.Module):
    """y = linear(x) + x P Q · s, with P = Aᵀ (k, r) and Q = Bᵀ (r, d); to merge is to make another layer."""

    def __init__(self, linear: nn.Linear, spec: LoraSpec) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.rank, self.own_scaling, self.factor = spec.rank, spec.scaling, 1.0
        self.enabled = True
        self.dropout = nn.Dropout(spec.dropout)
        weight = linear.weight
        self.in_proj = nn.Parameter(torch.randn_like(weight.new_empty(linear.in_features, spec.rank)))
        self.out_proj = nn.Parameter(weight.new_zeros(spec.rank, linear.out_features))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y + self.dropout(x) @ self.in_proj @ self.out_proj * self.scaling if self.enabled else y

    @property
    def scaling(self) -> float:
        return self.own_scaling * self.factor

    @torch.no_grad()
    def load(self, factors: Factors) -> None:
        factors.fit(self.rank, self.linear.in_features, self.linear.out_features)
        self.in_proj.copy_(factors.a.T)
        self.out_proj.copy_(factors.b.T)

    @torch.no_grad()
    def merge(self, factor: float = 1.0) -> nn.Linear:
        merged = copy.deepcopy(self.linear)
        if self.enabled:
            merged.weight += (self.in_proj @ self.out_proj).T * (self.scaling * factor)
        return merged

    def state(self) -> dict[str, Tensor]:
        return {"in_proj": self.in_proj.detach(), "out_proj": self.out_proj.detach()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        self.in_proj.copy_(state["in_proj"])
        self.out_proj.copy_(state["out_proj"])


def pool_of_pairs(layer: Projected, adapters: Sequence[tuple[LoraSpec, Factors]]) -> list[tuple[Tensor, Tensor, float]]:
    for spec, factors in adapters:
        factors.fit(spec.rank, layer.linear.in_features, layer.linear.out_features)
    return [(factors.a.T, factors.b.T, spec.scaling) for spec, factors in adapters]


def route_by_row(layer: Projected, pool: list[tuple[Tensor, Tensor, float]], x: Tensor, ids: Tensor) -> Tensor:
    """One row after another, each with its own pair."""
    rows = []
    for row, index in zip(x, ids.tolist(), strict=True):
        if not -1 <= index < len(pool):
            raise KeyError(f"no adapter {index}: there are {len(pool)}")
        y = layer.linear(row)
        if index >= 0:
            in_proj, out_proj, scaling = pool[index]
            y = y + row @ in_proj @ out_proj * scaling
        rows.append(y)
    return torch.stack(rows) if rows else layer.linear(x)


TRANSPOSED = Subject(
    "transposed",
    wrap=Projected,
    load=Projected.load,
    factors=lambda layer: Factors(layer.in_proj.T, layer.out_proj.T),
    merge=Projected.merge,
    merge_and_unload=Projected.merge,
    merge_scaled=Projected.merge,
    enable=lambda layer, enabled: setattr(layer, "enabled", enabled),
    scale=lambda layer, factor: setattr(layer, "factor", factor),
    weight=lambda layer: layer.linear.weight if isinstance(layer, Projected) else layer.weight,
    state=Projected.state,
    load_state=Projected.load_state,
    pool=pool_of_pairs,
    route=route_by_row,
)


class Windowed(nn.Module):
    """The factors are every other number of one buffer, down the columns; y is a transposed view of Yᵀ (d, n).

    To merge is to exchange the weight's storage for that of W + s B A, and to unmerge is to exchange it again.
    """

    def __init__(self, base: nn.Linear, spec: LoraSpec) -> None:
        super().__init__()
        k, d, r = base.in_features, base.out_features, spec.rank
        self.scaling, self.shape, self.dropout = spec.scaling, (r, k, d), nn.Dropout(spec.dropout)
        self.weight, self.bias = base.weight.requires_grad_(False), base.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        buffer = base.weight.new_zeros(2 * r * (k + d) + 1)
        self.lora_A = nn.Parameter(buffer.as_strided((r, k), (2, 2 * r), 1).normal_(std=1 / r))
        self.lora_B = nn.Parameter(buffer.as_strided((d, r), (2, 2 * d), 2 * r * k + 1))
        self.enabled = True
        self.other: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        columns = x.reshape(-1, x.shape[-1]).T
        y = self.weight @ columns
        if self.bias is not None:
            y = y + self.bias[:, None]
        if self.enabled and self.other is None:
            y = y + self.lora_B @ (self.scaling * (self.lora_A @ self.dropout(columns)))
        return y.T.view(*x.shape[:-1], len(y))

    @torch.no_grad()
    def load(self, factors: Factors) -> None:
        factors.fit(*self.shape)
        self.require_unmerged()
        self.lora_A.copy_(factors.a)
        self.lora_B.copy_(factors.b)

    def require_unmerged(self) -> None:
        if self.other is not None:
            raise RuntimeError("unmerge first")

    def enable(self, enabled: bool) -> None:
        self.unmerge()
        self.enabled = enabled

    @torch.no_grad()
    def merge(self) -> None:
        if self.other is None and self.enabled:
            scaled = self.scaling * self.lora_A
            self.other, self.weight.data = self.weight.data, self.weight + self.lora_B @ scaled

    def unmerge(self) -> None:
        if self.other is not None:
            self.weight.data, self.other = self.other, None

    def state(self) -> dict[str, Tensor]:
        return {"A": self.lora_A.detach(), "B": self.lora_B.detach()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        self.require_unmerged()
        self.lora_A.copy_(state["A"])
        self.lora_B.copy_(state["B"])


class Slots(NamedTuple):
    """Adapters side by side, (R, k, slots) and (d, R, slots): zeros beyond an adapter's rank, and all of the last."""

    down: Tensor
    up: Tensor


def pool_of_slots(layer: Windowed, adapters: Sequence[tuple[LoraSpec, Factors]]) -> Slots:
    _, k, d = layer.shape
    rank, slots = max(spec.rank for spec, _ in adapters), len(adapters) + 1
    pool = Slots(layer.weight.new_zeros(rank, k, slots), layer.weight.new_zeros(d, rank, slots))
    for slot, (spec, factors) in enumerate(adapters):
        factors.fit(spec.rank, k, d)
        pool.down[: spec.rank, :, slot] = spec.scaling * factors.a.detach()
        pool.up[:, : spec.rank, slot] = factors.b.detach()
    return pool


def route_to_slots(layer: Windowed, pool: Slots, x: Tensor, ids: Tensor) -> Tensor:
    """Id -1 is the last slot, as it is of any Python sequence; y is a view of (n, d, tokens)."""
    adapters = pool.down.shape[-1] - 1
    if len(ids) and not -1 <= int(ids.min()) <= int(ids.max()) < adapters:
        raise IndexError(f"adapter ids must be in -1 .. {adapters - 1}, got {ids.tolist()}")
    layer.require_unmerged()
    columns = (x if x.ndim == 3 else x[:, None]).mT
    down, up = pool.down[..., ids].movedim(-1, 0), pool.up[..., ids].movedim(-1, 0)
    y = torch.baddbmm(layer.weight @ columns, up, down @ columns)
    y = y if layer.bias is None else y + layer.bias[:, None]
    return y.mT if x.ndim == 3 else y[..., 0]


WINDOWED = Subject(
    "windowed",
    wrap=Windowed,
    load=Windowed.load,
    factors=lambda layer: Factors(layer.lora_A, layer.lora_B),
    merge=Windowed.merge,
    unmerge=Windowed.unmerge,
    enable=Windowed.enable,
    weight=lambda layer: layer.weight,
    state=Windowed.state,
    load_state=Windowed.load_state,
    pool=pool_of_slots,
    route=route_to_slots,
)
