"""Subjects with a bug each, to be named as an implementer would: by the path of this file."""

from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from torch import Tensor, nn

from lora_bench import REFERENCE
from lora_bench.reference import LoraLinear
from lora_bench.spec import LoraSpec

PLANTED = Path(__file__)


def raises(base: nn.Module, spec: LoraSpec) -> NoReturn:
    raise RuntimeError("no kernel for this machine")


class Dropped(LoraLinear):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        return y


class Greedy(LoraLinear):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) > 1:
            raise MemoryError("a batch is too much")
        return super().forward(x)


RAISES = replace(REFERENCE, name="raises", wrap=raises)
DROPPED = replace(REFERENCE, name="dropped", wrap=Dropped)
GREEDY = replace(REFERENCE, name="greedy", wrap=Greedy)
NO_SUBJECT = 1
