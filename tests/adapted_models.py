"""Small models for the reference to adapt, in whole numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from lora_bench.reference.model import LoraModel, adapt
from lora_bench.spec import LoraSpec

SPEC = LoraSpec(2, 3.0)
# PEFT warns that it has found embeddings among the targets, and sets fan_in_fan_out itself.
marks = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("seeded")]


class Small(nn.Module):
    """Several kinds of layer under names that look alike, with small integers for values: every sum is exact."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.q = nn.Linear(4, 4)
        self.block = nn.ModuleDict({"q": nn.Linear(4, 6), "xq": nn.Linear(4, 6), "q_turned": Conv1D(6, 6)})
        self.line = nn.Conv1d(3, 2, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 5)
        self.double().eval()
        whole(self)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.q(self.table(ids))
        y: Tensor = self.head(self.line(self.block["q_turned"](self.block["q"](x) - self.block["xq"](x))))
        return y


IDS = torch.tensor([[0, 6, 3], [3, 1, 2]])
KINDS = ["q", "table", "block.q_turned", "line"]


def whole(module: nn.Module) -> None:
    """Small integers for every parameter."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape))


def drawn(model: nn.Module, targets: Sequence[str] | str, spec: LoraSpec = SPEC, **options: Any) -> LoraModel:
    """The model adapted, with integers for factors and for what is saved as a whole."""
    adapted = adapt(model, spec, targets, **options)
    for module in (*adapted.layers.values(), *adapted.copies.values()):
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data.copy_(torch.randint(-2, 3, parameter.shape))
    return adapted


def llama(**options: Any) -> Any:
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 8}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **options)).double().eval()
