"""Adapter folders as PEFT has them: a model of every kind of layer, its adapters, and what reading refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_bench.adapter import Adapted, read
from lora_bench.spec import Factors, LoraSpec

PREFIX = "base_model.model."
# PEFT warns of files that it does not find on the Hub, of grouped convolutions and of a flag that it sets itself.
marks = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("seeded")]


class Many(nn.Module):
    """One layer of each kind, with small integers for values: sums and products of them are exact in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 4)
        self.wide = nn.Linear(5, 4)
        self.table = nn.Embedding(7, 5)
        self.turned = Conv1D(6, 5)
        self.conv = nn.Conv2d(4, 6, (3, 2), groups=2)
        self.line = nn.Conv1d(3, 2, 3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(4, 3)
        self.double()
        whole(self)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.lin(x))
        return y


def drawn(*shape: int) -> Tensor:
    return torch.randint(-4, 5, shape).double()


def whole(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(drawn(*parameter.shape))


def made(spec: LoraSpec, d_in: int, d_out: int, **shape: Any) -> Adapted:
    """An adapted module with integers for factors."""
    groups = shape.get("groups", 1)
    b = torch.block_diag(*[drawn(d_out // groups, spec.rank // groups) for _ in range(groups)])
    bias = drawn(d_out) if spec.lora_bias else None
    magnitude = 1 + drawn(d_out).abs() if spec.dora else None
    return Adapted(spec, Factors(drawn(spec.rank, d_in), b, bias, magnitude), **shape)


def layer(model: nn.Module, path: str) -> Any:
    return model.get_submodule(f"base_model.model.{path}")


def loaded_by_peft(folder: Path, model: nn.Module) -> nn.Module:
    return PeftModel.from_pretrained(model, str(folder)).eval()


def refused(folder: Path) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        read(folder)
    return str(caught.value)


def configured(folder: Path, **fields: Any) -> str:
    """The file, after these fields of it were set."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return str(file)
