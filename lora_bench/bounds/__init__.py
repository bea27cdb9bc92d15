"""How far an honest computation may stray from the definition: elementwise rounding-error bounds.

Inputs are rounded once to the dtype and the *rounded* values go to both sides, so only the arithmetic errs.
Every product of a value with a chain of roundings is bounded by |value| times `Arithmetic.growth`, in the notation
of Higham, Accuracy and Stability of Numerical Algorithms (2nd ed.), section 3.1. Nothing here is fitted or guessed,
and overflow is outside of it. Shapes as in `lora_bench.definition`; everything returned is float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from lora_bench.bounds.arithmetic import FLOAT64, UNIT_ROUNDOFF, Arithmetic
from lora_bench.bounds.deviation import Deviation, visibility, worst
from lora_bench.definition import Gradients

if TYPE_CHECKING:
    from torch import Tensor

    from lora_bench.spec import Factors

__all__ = [
    "FLOAT64",
    "UNIT_ROUNDOFF",
    "Arithmetic",
    "Deviation",
    "decomposed",
    "either",
    "gradients",
    "magnitudes",
    "merged",
    "merged_weight",
    "separate",
    "unmerged_weight",
    "vanishing",
    "visibility",
    "worst",
]


class Magnitudes(NamedTuple):
    """The sums of absolute values that the bounds multiply, each broadcastable to (n, d_out).

    |W||x|, |b|, |s||B||A||x|, and what one underflow in each number that is read or stored adds up to, in units of it:
    a product may lose each of its terms, and each operand may be taken for zero, before or after it is scaled.
    """

    base: Tensor
    bias: Tensor | float
    adapter: Tensor
    underflow: Tensor


def magnitudes(x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, scaling: float) -> Magnitudes:
    """The magnitudes of y = x Wᵀ + b + s (x Aᵀ) Bᵀ."""
    x, weight, a, b = (tensor.double().abs() for tensor in (x, weight, factors.a, factors.b))
    s, d_in, rank = abs(scaling), factors.d_in, factors.rank
    hidden, of_x = x @ a.T, x.sum(1, keepdim=True)
    lost_in_base = weight.sum(1) + of_x + d_in
    lost_in_adapter = b @ a.sum(1) + (of_x + d_in + 1) * b.sum(1) + hidden.sum(1, keepdim=True) + rank + 1
    return Magnitudes(
        base=x @ weight.T,
        bias=0.0 if bias is None else bias.double().abs(),
        adapter=s * hidden @ b.T,
        underflow=lost_in_base + (s + 1) * lost_in_adapter + 3,
    )


def separate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: Factors,
    scaling: float,
    arithmetic: Arithmetic,
    *,
    sums: int = 1,
) -> Tensor:
    """The allowed |error| (n, d_out) of base(x) + s (x Aᵀ) Bᵀ, in any order of the scale and of the additions.

    The base is rounded as it is stored, again with its bias, again in the sum; the adapter's path when x Aᵀ, s,
    s times it, and the product with B are stored, and in the sums. The adapter's terms may also be added one by one
    to the base's running total, in one product with [W | B]. Where `factors` are those of several adapters stacked,
    `sums` is how many are added up.
    """
    size = magnitudes(x, weight, bias, factors, scaling)
    d_in, rank, biased = factors.d_in, factors.rank, bias is not None

    def error(arithmetic: Arithmetic) -> Tensor:
        return (
            arithmetic.growth((d_in,), 1 + biased + sums, carried=rank) * size.base
            + arithmetic.growth((), 1 + sums, carried=d_in + rank) * size.bias
            + arithmetic.growth((d_in, rank), 4 + biased + sums, carried=d_in) * size.adapter
            + arithmetic.underflow * size.underflow
        )

    return error(arithmetic) + error(FLOAT64)


def merged(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, scaling: float, arithmetic: Arithmetic
) -> Tensor:
    """The allowed |error| (n, d_out) of x (W + s B A)ᵀ + b with the merged weight stored in the dtype."""
    size = magnitudes(x, weight, bias, factors, scaling)
    d_in, rank, biased = factors.d_in, factors.rank, bias is not None
    underflow = size.underflow + x.double().abs() @ product_underflow(factors, scaling).T

    def error(arithmetic: Arithmetic) -> Tensor:
        return (
            arithmetic.growth((d_in,), 2 + biased, carried=rank) * size.base
            + arithmetic.growth((), 1, carried=d_in) * size.bias
            + arithmetic.growth((d_in, rank), 5 + biased) * size.adapter
            + arithmetic.underflow * underflow
        )

    return error(arithmetic) + error(FLOAT64)


def either(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, scaling: float, arithmetic: Arithmetic
) -> Tensor:
    """The allowed |error| (n, d_out) of an output that may come by way of `separate` or `merged`, no matter which."""
    layer = (x, weight, bias, factors, scaling)
    return torch.maximum(separate(*layer, arithmetic), merged(*layer, arithmetic))


def merged_weight(weight: Tensor, factors: Factors, scaling: float, arithmetic: Arithmetic) -> Tensor:
    """The allowed |error| (d_out, d_in) of the stored W + s B A: B A, s, their product and the sum are rounded."""
    product = _Product(factors, scaling)

    def error(arithmetic: Arithmetic) -> Tensor:
        return product.error(arithmetic, 4) + arithmetic.growth((), 1, carried=factors.rank) * weight.double().abs()

    return error(arithmetic) + error(FLOAT64)


def unmerged_weight(
    weight: Tensor, factors: Factors, scaling: float, arithmetic: Arithmetic, *, cycles: int = 1
) -> Tensor:
    """The allowed |error| (d_out, d_in) of (W + s B A) - s B A, for implementations that keep no copy of W.

    The error of the merge, that of the product that is taken away, and the rounding of their difference; of so many
    `cycles` of merging and unmerging the sum, each at the furthest that W may have strayed by then.
    """
    product, slack = _Product(factors, scaling), torch.zeros_like(weight, dtype=torch.float64)

    def error(own: Tensor, arithmetic: Arithmetic) -> Tensor:
        merge = arithmetic.growth((), 1, carried=factors.rank) * own + product.error(arithmetic, 4)
        strayed = merge + product.error(arithmetic, 3)
        last = arithmetic.growth((), 1, carried=factors.rank)
        # Taken away term by term, the product is still in the running total.
        return (1 + last) * strayed + last * own + arithmetic.growth((), 0, carried=factors.rank) * product.size

    for _ in range(cycles):
        own = weight.double().abs() + slack
        slack = slack + (error(own, arithmetic) + error(own, FLOAT64))
    return slack


def vanishing(factors: Factors, scaling: float, arithmetic: Arithmetic) -> Tensor:
    """The allowed |s B A| (d_out, d_in) where B A is zero but for rounding: of two sets of orthogonal directions.

    Each row of B and column of A is a sum of directions, which are orthogonal but for the error of a decomposition, in
    the norm (see `decomposed`); sum and storage are rounded in both.
    """
    b, a, rank = factors.b.double().norm(dim=1, keepdim=True), factors.a.double().norm(dim=0), factors.rank

    def error(arithmetic: Arithmetic) -> Tensor:
        lost = arithmetic.underflow * abs(scaling) * rank * (a + b + 1)
        return arithmetic.growth((10 * rank * rank, rank, rank), 4) * abs(scaling) * b * a + lost

    return error(arithmetic) + error(FLOAT64)


def decomposed(matrix: Tensor, arithmetic: Arithmetic) -> Tensor:
    """The allowed |error| of a matrix put together again from its singular values, elementwise the same everywhere.

    That of the decomposition by orthogonal transformations, in the norm (Higham, section 19.3, its constant c as 10),
    and of the product of the parts.
    """
    m, n = matrix.shape

    def error(arithmetic: Arithmetic) -> float:
        return arithmetic.growth((10 * m * n, min(m, n)), 4) * float(matrix.norm()) + arithmetic.underflow * m * n

    return torch.full_like(matrix.double(), error(arithmetic) + error(FLOAT64))


class _Product:
    """`size` is |s||B||A|, (d_out, d_in); `lost` what underflow in it adds up to."""

    def __init__(self, factors: Factors, scaling: float) -> None:
        self.rank, self.lost = factors.rank, product_underflow(factors, scaling)
        self.size = abs(scaling) * factors.b.double().abs() @ factors.a.double().abs()

    def error(self, arithmetic: Arithmetic, roundings: int) -> Tensor:
        """|error| of s B A after so many roundings."""
        return arithmetic.growth((self.rank,), roundings) * self.size + arithmetic.underflow * self.lost


def product_underflow(factors: Factors, scaling: float) -> Tensor:
    """What one underflow in each number of W + s B A adds up to, (d_out, d_in); see `Magnitudes`."""
    lost = factors.b.double().abs().sum(1, keepdim=True) + factors.a.double().abs().sum(0) + factors.rank + 1
    return (abs(scaling) + 1) * lost + 2


def gradients(
    x: Tensor,
    grad: Tensor,
    weight: Tensor,
    factors: Factors,
    scaling: float,
    arithmetic: Arithmetic,
    *,
    overlap: int = 1,
) -> Gradients:
    """The allowed |error| of dL/dA, dL/dB and dL/dx, every sum counted: over d_out or d_in, then over the n rows.

    `overlap` is the number of rows of x that one number of the input is part of, as in a convolution; that of the
    input's gradient is then the sum of dL/dx over them, and so is its bound.
    """
    rank, d_in, (rows, d_out) = factors.rank, factors.d_in, grad.shape
    x, grad, weight, a, b = (tensor.double().abs() for tensor in (x, grad, weight, factors.a, factors.b))
    s, through_b, hidden = abs(scaling), grad @ b, x @ a.T
    size = Gradients(s * through_b.T @ x, s * grad.T @ hidden, grad @ weight)
    size_x_adapter = s * through_b @ a
    underflow = gradient_underflow(x, grad, weight, factors, s)

    def error(arithmetic: Arithmetic) -> Gradients:
        return Gradients(
            arithmetic.growth((d_out, rows), 4) * size.a + arithmetic.underflow * underflow.a,
            arithmetic.growth((d_in, rows), 4) * size.b + arithmetic.underflow * underflow.b,
            arithmetic.growth((overlap * d_out,), 2, carried=overlap * rank) * size.x
            + arithmetic.growth((d_out, overlap * rank), 5, carried=overlap * d_out) * size_x_adapter
            + arithmetic.underflow * underflow.x,
        )

    return Gradients(*(own + exact for own, exact in zip(error(arithmetic), error(FLOAT64), strict=True)))


def gradient_underflow(x: Tensor, grad: Tensor, weight: Tensor, factors: Factors, s: float) -> Gradients:
    """What one underflow in each number of the gradients adds up to; x, grad, weight and s are absolute values.

    Each of grad, A, B and x in turn, each product of two of them, and, where the layer trains through W + s B A, the
    numbers of that sum and of gradᵀ x.
    """
    a, b, rows, d_in, d_out = factors.a.double().abs(), factors.b.double().abs(), len(x), factors.d_in, factors.d_out
    through_b, hidden, of_grad = grad @ b, x @ a.T, grad.sum(1, keepdim=True)
    lost = Gradients(
        a=(b.sum(0) + of_grad + d_out + 1).T @ x + through_b.sum(0)[:, None] + (rows + 1) * b.sum(0)[:, None] + rows,
        b=grad.T @ (a.sum(1) + x.sum(1, keepdim=True) + d_in + 1) + hidden.sum(0) + (rows + 1) * a.sum(1) + rows,
        x=b.sum(0) @ a + (of_grad + d_out + 1) * a.sum(0) + through_b.sum(1, keepdim=True) + factors.rank,
    )
    through_sum = grad @ product_underflow(factors, s) + weight.sum(0) + of_grad + d_out
    stored = 2 * s + 3
    return Gradients((s + 1) * lost.a + stored, (s + 1) * lost.b + stored, (s + 1) * lost.x + through_sum + stored)
