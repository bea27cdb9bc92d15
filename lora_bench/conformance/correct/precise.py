"""LoRA with its adapters in float32 on a base of 16 bits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lora_bench.spec import Factors, LoraSpec
from lora_bench.subject import Subject

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FIRST = "default"


class Upcast(nn.Module):
    """Adapters by name, each in float32 or wider; what they add is summed there and cast once to the base's dtype."""

    def __init__(self, base_layer: nn.Linear, spec: LoraSpec) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A, self.lora_B, self.lora_dropout = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.active: list[str] = [FIRST]
        self.enabled = True
        self.merged: dict[str, float] = {}
        self.add(FIRST, spec)

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.base_layer.weight.dtype, torch.float32)

    def add(self, name: str, spec: LoraSpec, factors: Factors | None = None) -> None:
        if name in self.scaling:
            raise KeyError(f"adapter {name!r} is there already")
        k, d, wide = self.base_layer.in_features, self.base_layer.out_features, self.wide
        self.lora_A[name] = nn.Linear(k, spec.rank, bias=False, dtype=wide)
        self.lora_B[name] = nn.Linear(spec.rank, d, bias=spec.lora_bias, dtype=wide)
        self.lora_dropout[name] = nn.Dropout(spec.dropout) if spec.dropout else nn.Identity()
        self.scaling[name] = spec.scaling
        for parameter in self.lora_B[name].parameters():
            nn.init.zeros_(parameter)
        if factors is not None:
            self.load(factors, name)

    def weights(self, name: str) -> Factors:
        a, b = self.lora_A[name], self.lora_B[name]
        assert isinstance(a, nn.Linear)
        assert isinstance(b, nn.Linear)
        return Factors(a.weight, b.weight, b.bias)

    @torch.no_grad()
    def load(self, factors: Factors, name: str = FIRST) -> None:
        own = self.weights(name)
        factors.fit(own.rank, own.d_in, own.d_out)
        if name in self.merged:
            raise RuntimeError(f"adapter {name!r} is merged")
        own.a.copy_(factors.a)
        own.b.copy_(factors.b)
        if own.bias is not None and factors.bias is not None:
            own.bias.copy_(factors.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        wide = y
        for name in self.active if self.enabled else ():
            if name not in self.merged:
                dropped = self.lora_dropout[name](x.to(self.wide))
                wide = wide + self.lora_B[name](self.lora_A[name](dropped)) * self.scaling[name]
        return wide.to(y.dtype)

    @torch.no_grad()
    def shift(self, name: str, factor: float) -> None:
        """Add a multiple of an adapter to the base's weight, and of its bias to the base's."""
        own, base = self.weights(name), self.base_layer
        base.weight.copy_(base.weight.to(self.wide) + factor * self.scaling[name] * (own.b @ own.a))
        if own.bias is not None:
            if base.bias is None:
                raise NotImplementedError("the base has no bias to merge that of B into")
            base.bias.copy_(base.bias.to(self.wide) + factor * self.scaling[name] * own.bias)

    def merge(self, names: Sequence[str] | None = None, factor: float = 1.0) -> None:
        for name in self.active if names is None else names:
            if name not in self.active:
                raise ValueError(f"adapter {name!r} does not act")
            if name not in self.merged:
                self.shift(name, factor)
                self.merged[name] = factor

    def unmerge(self) -> None:
        while self.merged:
            name, factor = self.merged.popitem()
            self.shift(name, -factor)

    def activate(self, names: Sequence[str]) -> None:
        if unknown := set(names) - set(self.scaling):
            raise KeyError(f"no adapters {sorted(unknown)}")
        self.unmerge()
        self.active = list(names)
        for own in self.scaling:
            self.lora_A[own].requires_grad_(own in names)
            self.lora_B[own].requires_grad_(own in names)

    def enable(self, enabled: bool) -> None:
        self.unmerge()
        self.enabled = enabled

    def delete(self, name: str) -> None:
        if name in self.active:
            raise ValueError(f"adapter {name!r} acts")
        for by_name in (self.lora_A, self.lora_B, self.lora_dropout, self.scaling):
            del by_name[name]

    @torch.no_grad()
    def combine(self, name: str, weights: Mapping[str, float], how: str) -> None:
        """By "cat", the scale and the weight shared out by their root, or by "svd" of the sum."""
        several = [(self.weights(one), weight * self.scaling[one]) for one, weight in weights.items()]
        if any(own.bias is not None for own, _ in several):
            raise NotImplementedError("a bias on B is not combined")
        if how == "cat":
            a = torch.cat([math.sqrt(abs(share)) * own.a for own, share in several])
            b = torch.cat([math.copysign(math.sqrt(abs(share)), share) * own.b for own, share in several], dim=1)
        elif how == "svd":
            total = torch.stack([share * (own.b.double() @ own.a.double()) for own, share in several]).sum(0)
            left, values, right = torch.linalg.svd(total, full_matrices=False)
            b, a = left * values.sqrt(), values.sqrt()[:, None] * right
        else:
            raise NotImplementedError("a sum of factors has cross terms")
        self.add(name, LoraSpec(len(a), float(len(a))), Factors(a.to(self.wide), b.to(self.wide)))

    def state(self) -> dict[str, Tensor]:
        named = self.named_parameters()
        return {name: value.detach() for name, value in named if name.startswith("lora_") and f".{FIRST}." in name}


def pool(layer: Upcast, adapters: Sequence[tuple[LoraSpec, Factors]]) -> list[tuple[Factors, float]]:
    for spec, factors in adapters:
        factors.fit(spec.rank, layer.base_layer.in_features, layer.base_layer.out_features)
    return [(factors.to(layer.wide), spec.scaling) for spec, factors in adapters]


def route(layer: Upcast, pool: list[tuple[Factors, float]], x: Tensor, ids: Tensor) -> Tensor:
    """The rows in the order of their ids, each run of them through its adapter, and back in their places."""
    order = ids.argsort()
    names, lengths = ids[order].unique_consecutive(return_counts=True)
    y: Tensor = layer.base_layer(x)
    deltas = []
    for index, rows in zip(names.tolist(), x[order].to(layer.wide).split(lengths.tolist()), strict=True):
        if not -1 <= index < len(pool):
            raise IndexError(f"no adapter {index} in a pool of {len(pool)}")
        if index < 0:
            deltas.append(rows.new_zeros(*rows.shape[:-1], y.shape[-1]))
        else:
            factors, scaling = pool[index]
            delta = scaling * (rows @ factors.a.mT) @ factors.b.mT
            deltas.append(delta if factors.bias is None else delta + scaling * factors.bias)
    return (y + torch.cat(deltas)[order.argsort()]).to(y.dtype) if deltas else y


UPCAST = Subject(
    "upcast",
    wrap=Upcast,
    load=Upcast.load,
    factors=lambda layer: layer.weights(FIRST),
    merge=Upcast.merge,
    unmerge=Upcast.unmerge,
    merge_adapters=Upcast.merge,
    merge_scaled=lambda layer, factor: layer.merge(factor=factor),
    enable=Upcast.enable,
    weight=lambda layer: layer.base_layer.weight,
    state=Upcast.state,
    load_state=lambda layer, state: layer.load_state_dict(layer.state_dict() | state),
    pool=pool,
    route=route,
    add=Upcast.add,
    activate=Upcast.activate,
    delete=Upcast.delete,
    combine=Upcast.combine,
    variants=("lora_bias",),
)
