"""LoRA on one linear layer: the definition, as a module that trains, merges and unmerges."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_bench.reference.four_bit import Nf4Linear
from lora_bench.spec import Factors

if TYPE_CHECKING:
    from lora_bench.spec import LoraSpec


class LoraLinear(nn.Module):
    """y = base_layer(x) + s · dropout(x) Aᵀ Bᵀ over an existing linear layer, which is frozen and kept.

    x is (..., d_in). lora_A is (r, d_in), drawn from U(±1/sqrt(d_in)) as nn.Linear's weight is; lora_B is (d_out, r),
    zero, so that the layer starts as its base (Hu et al. 2021, arXiv 2106.09685, section 4.1). Both take their dtype
    and device from the base, an nn.Linear or, as in QLoRA (arXiv 2305.14314), an `Nf4Linear`.
    """

    def __init__(self, base_layer: nn.Linear | Nf4Linear, spec: LoraSpec) -> None:
        if not isinstance(base_layer, nn.Linear | Nf4Linear):
            raise TypeError(f"LoraLinear wraps an nn.Linear or an Nf4Linear, got a {type(base_layer).__name__}")
        super().__init__()
        weight = dense_weight(base_layer)
        self.base_layer: nn.Linear | Nf4Linear = base_layer.requires_grad_(False)
        self.spec = spec
        self.enabled = True
        self.lora_A = nn.Parameter(weight.new_empty(spec.rank, base_layer.in_features))
        self.lora_B = nn.Parameter(weight.new_zeros(base_layer.out_features, spec.rank))
        nn.init.uniform_(self.lora_A, -1 / math.sqrt(base_layer.in_features), 1 / math.sqrt(base_layer.in_features))
        self._unmerged_weight: Tensor | None
        self.register_buffer("_unmerged_weight", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if self.merged or not self.enabled:
            return y
        hidden = functional.linear(functional.dropout(x, self.spec.dropout, self.training), self.lora_A)
        return y + functional.linear(hidden * self.spec.scaling, self.lora_B)

    @property
    def factors(self) -> Factors:
        """The live parameters."""
        return Factors(self.lora_A, self.lora_B)

    @torch.no_grad()
    def load(self, factors: Factors) -> None:
        """Copy `factors` in.

        Raises ValueError where their shapes do not fit or their values overflow the dtype, RuntimeError while merged.
        """
        factors.fit(self.spec.rank, self.base_layer.in_features, self.base_layer.out_features)
        self._refuse_merged("loading other factors: the merged weight holds the old ones")
        held = factors.to(self.lora_A.dtype)
        self.lora_A.copy_(held.a)
        self.lora_B.copy_(held.b)

    def adapter_state(self) -> dict[str, Tensor]:
        """What training has made and an adapter file holds: lora_A and lora_B alone."""
        return {"lora_A": self.lora_A.detach(), "lora_B": self.lora_B.detach()}

    def enable(self, enabled: bool) -> None:
        """Switch the adapter on or off; off gives the base layer's own output, also after a merge."""
        if not enabled:
            self.unmerge()
        self.enabled = enabled

    @property
    def merged(self) -> bool:
        return self._unmerged_weight is not None

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + s B A, (d_out, d_in), summed in float32 or wider and rounded once to the dtype of W."""
        weight = dense_weight(self.base_layer) if self._unmerged_weight is None else self._unmerged_weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        a, b = self.lora_A.to(wide), self.lora_B.to(wide)
        return torch.addmm(weight.to(wide), b, a, alpha=self.spec.scaling).to(weight.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Write W + s B A into the base layer, keeping W for an exact `unmerge`; merging twice is once.

        Raises TypeError for a 4-bit base, whose weight cannot hold the sum, RuntimeError while the adapter is off.
        """
        if isinstance(self.base_layer, Nf4Linear):
            raise TypeError("a 4-bit base cannot hold W + s B A; merge_and_unload gives a dense layer")
        self._refuse_disabled()
        if not self.merged:
            merged = self.merged_weight()
            self._unmerged_weight = self.base_layer.weight.detach().clone()
            self.base_layer.weight.copy_(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the base weight, bit for bit; without a merge nothing happens."""
        if self._unmerged_weight is not None and isinstance(self.base_layer, nn.Linear):
            self.base_layer.weight.copy_(self._unmerged_weight)
            self._unmerged_weight = None

    def merge_and_unload(self) -> nn.Linear:
        """A plain layer with the merged weight and no adapter, for deployment; shares no storage with this one.

        Raises RuntimeError while the adapter is off.
        """
        self._refuse_disabled()
        layer = nn.Linear(self.base_layer.in_features, self.base_layer.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(self.merged_weight(), requires_grad=False)
        layer.register_parameter("bias", copy.deepcopy(self.base_layer.bias))
        return layer

    def train(self, mode: bool = True) -> LoraLinear:
        """As in nn.Module; RuntimeError for training while merged, when A and B would silently get no gradient."""
        if mode:
            self._refuse_merged("training: a merged adapter gets no gradient")
        super().train(mode)
        return self

    def _save_to_state_dict(self, *arguments: Any) -> None:
        self._refuse_merged("saving the whole layer: its base weight holds the adapter, which would be applied twice")
        super()._save_to_state_dict(*arguments)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._refuse_merged("loading a whole layer: the merged weight would be taken for its base")
        super()._load_from_state_dict(*arguments)

    def _refuse_disabled(self) -> None:
        if not self.enabled:
            raise RuntimeError("enable the adapter before merging it")

    def _refuse_merged(self, what: str) -> None:
        if self.merged:
            raise RuntimeError(f"unmerge before {what}")


def dense_weight(base_layer: nn.Linear | Nf4Linear) -> Tensor:
    """The weight that the base layer multiplies by, (d_out, d_in)."""
    return base_layer.dequantise() if isinstance(base_layer, Nf4Linear) else base_layer.weight.detach()
