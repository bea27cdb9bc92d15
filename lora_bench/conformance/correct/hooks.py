"""LoRA by a forward hook: the base layer stays what it was, and what its adapters give is added to its output."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_bench.conformance.correct.adapters import Low, low, weight_of
from lora_bench.spec import Factors
from lora_bench.subject import Subject

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch.utils.hooks import RemovableHandle

    from lora_bench.spec import LoraSpec

FIRST = "default"


class Blend(nn.Module):
    """An adapter that is a weighted sum of copies of others."""

    def __init__(self, parts: Iterable[tuple[float, nn.Module]]) -> None:
        super().__init__()
        self.weights, several = zip(*parts, strict=True)
        self.parts: Any = nn.ModuleList(copy.deepcopy(part) for part in several)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([weight * part(x) for weight, part in zip(self.weights, self.parts, strict=True)]).sum(0)

    def change(self) -> Tensor:
        several = zip(self.weights, self.parts, strict=True)
        return torch.stack([weight * part.change() for weight, part in several]).sum(0)


class Adapters(nn.Module):
    """What hangs on a layer: its adapters, which of them act, which are merged, and the weight from before."""

    def __init__(self) -> None:
        super().__init__()
        self.named: Any = nn.ModuleDict()
        self.active: list[str] = [FIRST]
        self.merged: list[str] = []
        self.factor, self.enabled = 1.0, True
        self.before: Tensor | None = None
        self.handle: RemovableHandle | None = None

    def hook(self, _layer: nn.Module, given: tuple[Any, ...], y: Tensor) -> Tensor:
        for name in self.active if self.enabled else ():
            if name not in self.merged:
                y = y + (self.named[name](*given) if self.factor == 1 else self.factor * self.named[name](*given))
        return y

    @torch.no_grad()
    def merge(self, weight: Tensor, names: Sequence[str], factor: float) -> None:
        if unfit := [name for name in names if name not in self.active]:
            raise ValueError(f"only an adapter that acts can be merged, got {unfit}")
        self.before = weight.clone() if self.before is None else self.before
        for name in names:
            if name not in self.merged:
                self.merged.append(name)
                weight += factor * self.named[name].change()

    @torch.no_grad()
    def unmerge(self, weight: Tensor) -> None:
        if self.before is not None:
            weight.copy_(self.before)
        self.before, self.merged = None, []


def wrap(layer: nn.Module, spec: LoraSpec) -> nn.Module:
    """The layer itself."""
    layer.requires_grad_(False)
    adapters = Adapters()
    adapters.named[FIRST] = low(layer, spec)
    layer.adapters = adapters
    adapters.handle = layer.register_forward_hook(adapters.hook)
    return layer


def first(layer: Any) -> Low:
    found = layer.adapters.named[FIRST]
    assert isinstance(found, Low)
    return found


def load(layer: Any, factors: Factors) -> None:
    unmerge(layer)
    first(layer).load(factors)


def merge(layer: Any, names: Sequence[str] | None = None, factor: float = 1.0) -> None:
    if not isinstance(getattr(layer, "weight", None), Tensor):
        raise NotImplementedError("a quantised weight holds no sum")
    names = layer.adapters.active if names is None else names
    layer.adapters.merge(layer.weight.data, names, factor * layer.adapters.factor)


def unmerge(layer: Any) -> None:
    if layer.adapters.before is not None:
        layer.adapters.unmerge(layer.weight.data)


def unload(layer: Any) -> nn.Module:
    merge(layer)
    layer.adapters.handle.remove()
    del layer.adapters
    plain_layer: nn.Module = layer
    return plain_layer


def activate(layer: Any, names: Sequence[str]) -> None:
    if unknown := [name for name in names if name not in layer.adapters.named]:
        raise KeyError(f"no adapters {unknown}")
    unmerge(layer)
    layer.adapters.active = list(names)
    for name, adapter in layer.adapters.named.items():
        adapter.requires_grad_(name in names)


def enable(layer: Any, enabled: bool) -> None:
    unmerge(layer)
    layer.adapters.enabled = enabled


def add(layer: Any, name: str, spec: LoraSpec, factors: Factors) -> None:
    if name in layer.adapters.named:
        raise KeyError(f"adapter {name!r} is there already")
    fresh = low(layer, spec)
    fresh.load(factors)
    layer.adapters.named[name] = fresh


def delete(layer: Any, name: str) -> None:
    if name in layer.adapters.active:
        raise ValueError(f"adapter {name!r} acts")
    del layer.adapters.named[name]


def combine(layer: Any, name: str, weights: Mapping[str, float], _how: str) -> None:
    layer.adapters.named[name] = Blend([(weight, layer.adapters.named[one]) for one, weight in weights.items()])


def scale(layer: Any, factor: float) -> None:
    unmerge(layer)
    layer.adapters.factor = factor


def state(layer: Any) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in first(layer).named_parameters()}


HOOKED = Subject(
    "hooked",
    wrap=wrap,
    load=load,
    factors=lambda layer: Factors(*first(layer).matrices()),
    merge=merge,
    unmerge=unmerge,
    merge_and_unload=unload,
    merge_adapters=merge,
    merge_scaled=lambda layer, factor: merge(layer, factor=factor),
    enable=enable,
    scale=scale,
    weight=weight_of,
    state=state,
    load_state=lambda layer, state: first(layer).load_state_dict(state),
    add=add,
    activate=activate,
    delete=delete,
    combine=combine,
    layers=("linear", "fan_in_fan_out", "embedding", "conv1d", "conv2d", "conv3d", "nf4"),
)
