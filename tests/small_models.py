"""Models that are built in no time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_bench.models.build import build
from lora_bench.spec import LoraSpec

SPEC = LoraSpec(rank=3, alpha=7.0)


def micro(dtype: torch.dtype = torch.float32) -> Any:
    return build("micro", dtype=dtype, device="cpu")


class Nested(nn.Module):
    """Names that suffixes must tell apart, a layer in two places, and layers that are not linear."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.block = nn.ModuleDict({"q_proj": nn.Linear(4, 6), "xq_proj": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
        self.twin = self.block["xq_proj"]
        self.embed = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.twin(self.q_proj(x))
        return y
