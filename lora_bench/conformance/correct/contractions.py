"""LoRA as one contraction of many indices, in float64 whatever the dtype, and rounded once.

A convolution is contracted with the windows of its input, an embedding with indicator vectors, all by hand.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_bench.spec import Factors
from lora_bench.subject import Subject

if TYPE_CHECKING:
    from lora_bench.spec import LoraSpec


def windows(layer: Any, x: Tensor) -> Tensor:
    """What each output of a layer is a product with, features last: (..., d_in), or (..., channels · places)."""
    if isinstance(layer, nn.Embedding):
        return functional.one_hot(x, layer.num_embeddings).double()
    if not hasattr(layer, "kernel_size"):
        return x.double()
    dimensions = len(layer.kernel_size)
    sides = [side for side in reversed(layer.padding) for _ in range(2)]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = functional.pad(x.double(), sides, mode=mode)
    for dimension, (size, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
    ):
        x = x.unfold(dimension, (size - 1) * dilation + 1, stride)[..., ::dilation]
    return x.movedim(1, 1 + dimensions).flatten(1 + dimensions)


def turned(layer: Any) -> bool:
    """Whether the weight is kept with its inputs first, as transformers' Conv1D and an embedding keep it."""
    return not isinstance(layer, nn.Linear) and layer.weight.ndim == 2


def matrix(layer: Any) -> Tensor:
    """The weight as (d_out, features), in float64."""
    weight: Tensor = layer.weight.double()
    return weight.mT if turned(layer) else weight.flatten(1)


class Contracted(nn.Module):
    """y = Σ x W + s Σ x A B + b over whatever indices there are; merging loads an export into a plain layer."""

    def __init__(self, layer: Any, spec: LoraSpec) -> None:
        super().__init__()
        if getattr(layer, "groups", 1) > 1:
            raise NotImplementedError("no grouped kernels")
        self.layer, self.scaling, self.on = layer.requires_grad_(False), spec.scaling, True
        self.dropout = nn.Dropout(spec.dropout)
        d_out, features = matrix(layer).shape
        like = layer.weight
        self.a = nn.Parameter(torch.rand(spec.rank, features, dtype=torch.float64).to(like))
        self.b = nn.Parameter(torch.zeros(d_out, spec.rank).to(like))

    def forward(self, x: Tensor) -> Tensor:
        seen, a, b = windows(self.layer, x), self.a.double(), self.b.double()
        y = torch.einsum("...k,dk->...d", seen, matrix(self.layer))
        if self.on:
            delta = torch.einsum("dr,...k,rk->...d", b, self.dropout(seen), a)
            y = y.addcmul(delta, y.new_tensor(self.scaling))
        if getattr(self.layer, "bias", None) is not None:
            y = y + self.layer.bias.double()
        y = y.movedim(-1, 1) if hasattr(self.layer, "kernel_size") else y
        return y.to(self.a.dtype)

    @torch.no_grad()
    def load(self, factors: Factors) -> None:
        factors.fit(len(self.a), self.a.shape[1], len(self.b))
        self.a.copy_(factors.a)
        self.b.copy_(factors.b)

    @torch.no_grad()
    def export(self) -> dict[str, Tensor]:
        """The state of a layer without adapters."""
        total = matrix(self.layer) + self.scaling * torch.einsum("rk,dr->dk", self.a.double(), self.b.double())
        kept = self.layer.weight
        weight = total.mT if turned(self.layer) else total.view_as(kept)
        return self.layer.state_dict() | {"weight": weight.to(kept.dtype)}

    def merge(self) -> nn.Module:
        plain_layer: nn.Module = copy.deepcopy(self.layer)
        plain_layer.load_state_dict(self.export())
        return plain_layer


def weight_of(layer: Any) -> Tensor:
    """That of the plain layer, which a merged one is itself."""
    kept: Tensor = layer.layer.weight if isinstance(layer, Contracted) else layer.weight
    return kept


CONTRACTED = Subject(
    "contracted",
    wrap=Contracted,
    load=Contracted.load,
    factors=lambda layer: Factors(layer.a, layer.b),
    merge=Contracted.merge,
    merge_and_unload=Contracted.merge,
    enable=lambda layer, enabled: setattr(layer, "on", enabled),
    weight=weight_of,
    state=lambda layer: {"a": layer.a, "b": layer.b},
    load_state=lambda layer, state: layer.load_state_dict(layer.state_dict() | state),
    layers=("linear", "fan_in_fan_out", "embedding", "conv1d", "conv2d", "conv3d"),
)
