"""A model of one layer, for libraries that find the layers in a model and adapt them there."""

from __future__ import annotations

from torch import Tensor, nn


class OneLayer(nn.Module):
    """Computes what its layer does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y
