"""A single linear layer in the place of a model: what one shape costs, without anything around it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SingleLayer(nn.Module):
    """y = x W^T for x of (..., d_in): one nn.Linear without a bias, which may be replaced as any layer of a model."""

    def __init__(self, d_in: int, d_out: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.linear: nn.Module = nn.Linear(d_in, d_out, bias=False, dtype=dtype, device=device)
        self.d_in, self.d_out, self.dtype = d_in, d_out, dtype
        self.device = self.linear.weight.device  # as a layer of a subject need not have a parameter

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y

    def draw(self, batch: int, length: int, *, outputs: bool = False) -> Tensor:
        """Seeded normal rows (batch, length, d_in), or (batch, length, d_out), on the layer's device."""
        shape = batch, length, self.d_out if outputs else self.d_in
        return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(self.device, self.dtype)
