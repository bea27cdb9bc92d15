"""LoRA with a backward of its own: the formulas written out, nothing kept of the forward but x."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_bench.conformance.correct.specs import finite
from lora_bench.spec import Factors
from lora_bench.subject import Subject

if TYPE_CHECKING:
    from lora_bench.spec import LoraSpec


class LowRank(torch.autograd.Function):
    """y = x Wᵀ + b + s (mask x) Aᵀ Bᵀ over rows x (n, k); x Aᵀ is computed again in the backward."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)  # type: ignore[untyped-decorator]
    def forward(ctx: Any, x: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, *adapter: Any) -> Tensor:
        a, b, scaling = adapter
        ctx.save_for_backward(x, mask, weight, a, b)
        ctx.scaling = scaling
        hidden = (x if mask is None else x * mask) @ a.mT
        y = x @ weight.mT if bias is None else torch.addmm(bias, x, weight.mT)
        return y.addmm_(hidden, b.mT, alpha=scaling)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        x, mask, weight, a, b = ctx.saved_tensors
        seen = x if mask is None else x * mask
        through = grad @ b * ctx.scaling
        grad_a = through.mT @ seen if ctx.needs_input_grad[4] else None
        grad_b = torch.mm(grad.mT, seen @ a.mT).mul_(ctx.scaling) if ctx.needs_input_grad[5] else None
        grad_x = None
        if ctx.needs_input_grad[0] and mask is None:
            grad_x = (grad @ weight).addmm_(through, a)
        elif ctx.needs_input_grad[0]:
            grad_x = grad @ weight + through @ a * mask
        return grad_x, None, None, None, grad_a, grad_b, None


class Manual(nn.Linear):
    """Is itself the linear layer, and takes over the base's parameters; merging it overwrites them."""

    def __init__(self, base: nn.Linear, spec: LoraSpec) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias = base.weight.requires_grad_(False), base.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.scaling, self.dropout, self.switched_on = finite(spec.scaling), nn.Dropout(spec.dropout), True
        self.lora_A = nn.Parameter(torch.empty_like(self.weight[:1]).repeat(spec.rank, 1).uniform_(-0.1, 0.1))
        self.lora_B = nn.Parameter(torch.zeros_like(self.weight[:, :1]).repeat(1, spec.rank))
        self.before_merge: Tensor | None
        self.register_buffer("before_merge", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.before_merge is not None or not self.switched_on:
            return super().forward(x)
        rows, mask = x.reshape(-1, self.in_features), None
        if self.training and self.dropout.p:
            mask = self.dropout(torch.ones_like(rows))
        base, adapter = (self.weight, self.bias), (self.lora_A, self.lora_B, self.scaling)
        y: Tensor = LowRank.apply(rows, mask, *base, *adapter)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def load(self, factors: Factors) -> None:
        factors.fit(len(self.lora_A), self.in_features, self.out_features)
        again = self.before_merge is not None
        self.unmerge()
        self.lora_A.copy_(factors.a)
        self.lora_B.copy_(factors.b)
        if again:
            self.merge()

    @torch.no_grad()
    def merge(self) -> None:
        if self.before_merge is None and self.switched_on:
            self.before_merge = self.weight.clone()
            self.weight.copy_(torch.einsum("dr,rk->dk", self.lora_B, self.lora_A).mul_(self.scaling).add_(self.weight))

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.before_merge is not None:
            self.weight.copy_(self.before_merge)
            self.before_merge = None

    def switch(self, on: bool) -> None:
        self.unmerge()
        self.switched_on = on


HANDWRITTEN = Subject(
    "handwritten",
    wrap=Manual,
    load=Manual.load,
    factors=lambda layer: Factors(layer.lora_A, layer.lora_B),
    merge=Manual.merge,
    unmerge=Manual.unmerge,
    enable=Manual.switch,
    weight=lambda layer: layer.weight,
    state=lambda layer: {"lora_A": layer.lora_A, "lora_B": layer.lora_B},
    devices=("cpu",),
)
