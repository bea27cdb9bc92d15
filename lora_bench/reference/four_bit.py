"""A frozen linear layer whose weight is kept in 4 bits: the base of QLoRA (arXiv 2305.14314, equation 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

from lora_bench.reference.nf4 import BLOCK, Nf4, decode, dequantise, quantise

# Values dequantised at a time on a CPU: half a MiB of float32 stays in a core's second-level cache, where a whole
# matrix would be paged in anew on every call.
CHUNK = 2**17
STATISTICS = ("codes", "absmax", "nested_absmax", "offset")


class Nf4Linear(nn.Module):
    """y = x Wᵀ + bias with W dequantised from NF4 a few rows at a time; nothing of it trains, gradients reach x.

    x is (..., d_in), W (d_out, d_in), and y takes the dtype of x. `dtype` is that of `dequantise()`; it follows
    `.to(dtype)` as the bias does, while the quantised weight and its statistics only ever change device.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    _like: Tensor  # empty: nn.Module moves and casts it with everything else, so it knows the dtype

    def __init__(self, nf4: Nf4, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.out_features, self.in_features = nf4.shape
        for name in STATISTICS:
            self.register_buffer(name, getattr(nf4, name))
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=nf4.codes.device), persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, double: bool = True) -> Self:
        """Quantise the weight of `linear`, which is left as it is; raises what `quantise` raises."""
        return cls(quantise(linear.weight, double=double), linear.bias, linear.weight.dtype)

    @property
    def nf4(self) -> Nf4:
        shape = torch.Size((self.out_features, self.in_features))
        return Nf4(self.codes, self.absmax, self.nested_absmax, self.offset, shape)

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    def dequantise(self) -> Tensor:
        """W (d_out, d_in) in `dtype`: for x of that dtype, what `forward` multiplies by."""
        return dequantise(self.nf4, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Product.apply(x, self.nf4)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: getattr(self, name) for name in STATISTICS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            moved = getattr(self, name)
            if moved is not None and moved.dtype != tensor.dtype:  # rounded: take the original to the new device
                setattr(self, name, tensor.to(moved.device))
        return self

    def extra_repr(self) -> str:
        double, bias = self.offset is not None, self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, double={double}"


class Product(torch.autograd.Function):
    """x Wᵀ, and for the gradient of x, grad W; W is dequantised again rather than saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, nf4: Nf4) -> Tensor:
        ctx.nf4 = nf4
        x_rows = x.reshape(-1, x.shape[-1]).to(product_dtype(x))
        y = x.new_empty(len(x_rows), nf4.shape[0])
        for span, weight in parts(nf4, 0, x.dtype):
            y[:, span] = x_rows @ weight.to(x_rows.dtype).T
            del weight  # so that the next part takes its place in the cache
        return y.view(*x.shape[:-1], nf4.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        grad_rows = grad.reshape(-1, grad.shape[-1]).to(product_dtype(grad))
        grad_x = grad.new_empty(len(grad_rows), ctx.nf4.shape[1])
        for span, weight in parts(ctx.nf4, 1, grad.dtype):
            grad_x[:, span] = grad_rows @ weight.to(grad_rows.dtype)
            del weight
        return grad_x.view(*grad.shape[:-1], ctx.nf4.shape[1]), None


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype to multiply in: float32 for 16-bit numbers on a CPU that has no instructions for their products."""
    if x.device.type != "cpu" or x.dtype.itemsize != 2:
        return x.dtype
    has = torch.cpu.get_capabilities()
    native = x.dtype == torch.bfloat16 and (has.get("avx512_bf16") or has.get("bf16"))
    return x.dtype if native else torch.float32


def parts(nf4: Nf4, dim: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The dequantised weight, some rows (dim 0) or columns (dim 1) at a time, about CHUNK values.

    In one part on other devices than the CPU and where blocks do not end with the rows.
    """
    d_out, d_in = nf4.shape
    if d_in % BLOCK or nf4.codes.device.type != "cpu":
        yield slice(None), dequantise(nf4, dtype)
        return
    per_scale, per_byte = (1, 1) if dim == 0 else (BLOCK, 2)
    width = max(1, CHUNK // nf4.shape[1 - dim] // per_scale) * per_scale
    codes = nf4.codes.view(d_out, -1).split(width // per_byte, dim)
    scales = nf4.scale.view(d_out, -1).split(width // per_scale, dim)
    for start, code, scale in zip(range(0, nf4.shape[dim], width), codes, scales, strict=True):
        yield slice(start, start + width), decode(code, scale).to(dtype)
