"""The other kinds of layer: what A, B and B A are for each of them, in PEFT's shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_bench.reference.dora import DoraLinear
from lora_bench.reference.four_bit import Nf4Linear
from lora_bench.reference.layer import LoraLinear, uniform
from lora_bench.reference.lifecycle import LoraLayer
from lora_bench.spec import Factors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_bench.reference.adapter import Adapter
    from lora_bench.spec import LoraSpec

CONVOLVE: dict[int, Any] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
FAN_IN_FAN_OUT = "transformers.pytorch_utils.Conv1D"


class LoraFanInFanOut(LoraLinear):
    """LoRA on transformers' Conv1D, a linear layer that keeps its weight as (d_in, d_out)."""

    @staticmethod
    def fresh(base_layer: Any, rank: int) -> tuple[Tensor, Tensor]:
        d_in, d_out = base_layer.weight.shape
        return uniform(base_layer.weight.new_empty(rank, d_in)), base_layer.weight.new_zeros(d_out, rank)

    def plus(self, weight: Tensor, factors: Factors, scaling: float) -> Tensor:
        return torch.addmm(weight, factors.a.T, factors.b.T, alpha=scaling)


class LoraEmbedding(LoraLayer):
    """LoRA on an nn.Embedding, whose x are indices: A x, x standing for rows that are 1 at their index, is a look-up.

    lora_A is (r, vocabulary), drawn from N(0, 1) as nn.Embedding's weight is; lora_B is (embedding_dim, r). A dropout
    on such an x drops whole tokens. As in the base, the column of `padding_idx` gets no gradient. A bias on B merges
    into every token's row.
    """

    base_layer: nn.Embedding

    @staticmethod
    def fresh(base_layer: Any, rank: int) -> tuple[Tensor, Tensor]:
        if base_layer.max_norm is not None:
            raise NotImplementedError("an embedding with a max_norm changes its weight as it is used")
        like, (vocabulary, d_out) = base_layer.weight, base_layer.weight.shape
        return nn.init.normal_(like.new_empty(rank, vocabulary)), like.new_zeros(d_out, rank)

    def hidden(self, x: Tensor, adapter: Adapter) -> Tensor:
        rows = functional.embedding(x, adapter.lora_A.T, self.base_layer.padding_idx)
        if not self.training or not adapter.spec.dropout:
            return rows
        return rows * functional.dropout(rows.new_ones(*x.shape, 1), adapter.spec.dropout)

    def outward(self, hidden: Tensor, adapter: Adapter, bias: Tensor | None) -> Tensor:
        return functional.linear(hidden, adapter.lora_B, bias)

    def plus(self, weight: Tensor, factors: Factors, scaling: float) -> Tensor:
        total = torch.addmm(weight, factors.a.T, factors.b.T, alpha=scaling)
        return total if factors.bias is None else total + scaling * factors.bias

    def merged_bias(self, scalings: Mapping[str, float] | None = None) -> None:
        """None: an embedding has no bias."""


class LoraConv(LoraLayer):
    """LoRA on an nn.Conv1d, nn.Conv2d or nn.Conv3d: A is a convolution like the base's, B a 1x1 one.

    lora_A is (r, in_channels, *kernel_size) and moves over x as the base's kernel does, padding included; lora_B is
    (out_channels, r / groups, 1, ...). With groups A reads all channels and B only its group's part of A x, so that
    B A is no kernel with groups, and is neither merged nor handed out as matrices.
    """

    base_layer: nn.Conv1d | nn.Conv2d | nn.Conv3d

    @staticmethod
    def fresh(base_layer: Any, rank: int) -> tuple[Tensor, Tensor]:
        must_divide(rank, base_layer.groups)
        like, ones = base_layer.weight, [1] * len(base_layer.kernel_size)
        lora_A = uniform(like.new_empty(rank, base_layer.in_channels, *base_layer.kernel_size))
        return lora_A, like.new_zeros(base_layer.out_channels, rank // base_layer.groups, *ones)

    def hidden(self, x: Tensor, adapter: Adapter) -> Tensor:
        base = self.base_layer
        padding: Any = base.padding
        x = functional.dropout(x, adapter.spec.dropout, self.training)
        if base.padding_mode != "zeros":
            # The base's own list of paddings, which knows what "same" comes to.
            x, padding = functional.pad(x, base._reversed_padding_repeated_twice, base.padding_mode), 0  # noqa: SLF001
        return self.convolve(x, adapter.lora_A, None, base.stride, padding, base.dilation)

    def outward(self, hidden: Tensor, adapter: Adapter, bias: Tensor | None) -> Tensor:
        return self.convolve(hidden, adapter.lora_B, bias, groups=self.base_layer.groups)

    def convolve(self, *arguments: Any, **options: Any) -> Tensor:
        """torch's convolution of the base's dimensions."""
        y: Tensor = CONVOLVE[len(self.base_layer.kernel_size)](*arguments, **options)
        return y

    def plus(self, weight: Tensor, factors: Factors, scaling: float) -> Tensor:
        return torch.addmm(weight.flatten(1), factors.b, factors.a, alpha=scaling).view_as(weight)

    def matrices(self, adapter: Adapter) -> Factors:
        if self.base_layer.groups > 1:
            raise NotImplementedError(f"with {self.base_layer.groups} groups B A is no kernel that the base could have")
        return Factors(adapter.lora_A.flatten(1), adapter.lora_B.flatten(1), adapter.lora_bias)

    def shaped(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """A kernel of a, and of b what is in its groups' blocks; ValueError where there is more in b."""
        groups, ones = self.base_layer.groups, [1] * len(self.base_layer.kernel_size)
        must_divide(factors.rank, groups)
        lora_A = factors.a.unflatten(1, self.lora_A.shape[1:])
        return lora_A, torch.cat(factors.blocks(groups)).unflatten(1, (-1, *ones))


def must_divide(rank: int, groups: int) -> None:
    """Raise ValueError for a rank that groups cannot share out."""
    if rank % groups:
        raise ValueError(f"rank must be a multiple of the {groups} groups, got {rank}")


def wrap(base_layer: nn.Module, spec: LoraSpec) -> LoraLayer:
    """A layer of any kind with a fresh adapter.

    Raises TypeError for a base of none of the kinds, NotImplementedError for a DoRA on another than an nn.Linear.
    """
    if spec.dora:
        if not isinstance(base_layer, nn.Linear):
            raise NotImplementedError("DoRA is for nn.Linear here")
        return DoraLinear(base_layer, spec)
    for bases, kind in KINDS.items():
        if isinstance(base_layer, bases):
            return kind(base_layer, spec)
    # By name, so that nobody who has no such layer imports transformers.
    if any(f"{cls.__module__}.{cls.__name__}" == FAN_IN_FAN_OUT for cls in type(base_layer).__mro__):
        return LoraFanInFanOut(base_layer, spec)
    raise TypeError(f"no LoRA here for a {type(base_layer).__name__}")


KINDS: dict[tuple[type, ...], type[LoraLayer]] = {
    (nn.Linear, Nf4Linear): LoraLinear,
    (nn.Embedding,): LoraEmbedding,
    (nn.Conv1d, nn.Conv2d, nn.Conv3d): LoraConv,
}
