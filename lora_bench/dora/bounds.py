"""How far an honest computation of DoRA may stray from its definition, made as `lora_bench.bounds` makes its bounds.

Where a row of W + s B A is zero, or rounding could make it zero, the bound is infinite.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from lora_bench import bounds, definition
from lora_bench.bounds import FLOAT64, Arithmetic
from lora_bench.dora.definition import Gradients, factor, gradients, norms

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from lora_bench.spec import Factors


class Computed(NamedTuple):
    """How the factor comes out of an honest computation, each (d_out,).

    `inverse` is the most that 1 / norm may be and `relative` its relative error, which all that a row of the weight
    computes has in common; `stray` is the |error| of c before the quotient is rounded, `largest` the most that |c| may
    be by then, and `from_one` the most that |c - 1| may be.
    """

    inverse: Tensor
    relative: Tensor
    stray: Tensor
    largest: Tensor
    from_one: Tensor


def _computed(weight: Tensor, factors: Factors, scaling: float, arithmetic: Arithmetic) -> Computed:
    least, most = _norm_range(weight, factors, scaling, arithmetic)
    exact, norm = factor(weight, factors, scaling), norms(weight, factors, scaling)
    relative = torch.maximum(norm / least - 1, 1 - norm / most)
    # c is also lost where m is read as zero, and where c is stored and read.
    stray = _known(exact.abs() * relative + arithmetic.underflow * (2 / least + 3))
    return Computed(1 / least, relative, stray, exact.abs() + stray, (exact - 1).abs() + stray)


def _norm_range(weight: Tensor, factors: Factors, scaling: float, arithmetic: Arithmetic) -> tuple[Tensor, Tensor]:
    """The least and the most that the norm may be, each (d_out,).

    It is that of weights which each carry the error of a merged one; the squares are rounded, their sum, and its root.
    Some add the dtype's epsilon, so that it is never zero.
    """
    norm, unit, growth = norms(weight, factors, scaling), arithmetic.unit, arithmetic.growth((factors.d_in,), 2)
    moved = (bounds.merged_weight(weight, factors, scaling, arithmetic) + arithmetic.underflow).norm(dim=1)
    lost = (2 * factors.d_in + 1) * arithmetic.underflow
    least = ((norm - moved).clamp(min=0) ** 2 * (1 - growth) - lost).clamp(min=0).sqrt()
    most = ((norm + moved) ** 2 * (1 + growth) + lost).sqrt()
    least, most = (1 - unit) * least - arithmetic.underflow, (1 + unit) * most + arithmetic.underflow
    return least.clamp(min=0), (1 + unit) * (most + 2 * unit) + arithmetic.underflow


def norm_bound(weight: Tensor, factors: Factors, scaling: float, arithmetic: Arithmetic) -> Tensor:
    """The allowed |error| (d_out,) of the stored ||W + s B A||, and so of a fresh layer's magnitude."""
    norm = norms(weight, factors, scaling)

    def error(arithmetic: Arithmetic) -> Tensor:
        least, most = _norm_range(weight, factors, scaling, arithmetic)
        return torch.maximum(norm - least, most - norm)

    return _with_own(error, arithmetic)


def separate_bound(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, scaling: float, arithmetic: Arithmetic
) -> Tensor:
    """The allowed |error| (n, d_out) of the output, as it comes of the base's and the adapter's or through the weight.

    Four ways: base + (c - 1) base' + c s B A x, base' being the base without its bias, computed again or by taking the
    bias from it; base + (c (W + s B A) - W) x; c (W x + s B A x) + bias; and that of `merged_bound`. In the first two
    the base's error does not shrink with c, and what is left of a bias that was taken away is times c - 1.
    """
    size = bounds.magnitudes(x, weight, bias, factors, scaling)
    turned = definition.forward(x, weight, None, factors, scaling).abs()
    d_in, rank, biased = factors.d_in, factors.rank, bias is not None

    def error(arithmetic: Arithmetic) -> Tensor:
        of = _computed(weight, factors, scaling, arithmetic)
        # The base is rounded as it is stored, with its bias, and in two sums; then freed of it, c - 1, and times that.
        once, again = arithmetic.growth((d_in,), 3 + biased), arithmetic.growth((d_in,), 5 + 2 * biased)
        # c by its quotient, or the weight that it is in thrice; a product with [c W | c B] carries the adapter's terms.
        base = once + of.from_one * again + of.largest * arithmetic.growth((), 3, carried=rank) * (1 + again)
        # x Aᵀ, s, s times it, the product with B, the quotient, c times it, and three sums.
        adapter = of.largest * arithmetic.growth((d_in, rank), 9, carried=d_in)
        left = arithmetic.growth((), 1, carried=d_in) * (1 + arithmetic.growth((), 5))
        of_bias = arithmetic.growth((), 3, carried=d_in + rank) + (of.from_one + arithmetic.unit * of.largest) * left
        lost = arithmetic.underflow * (2 + of.from_one + of.largest) * size.underflow
        return of.stray * turned + base * size.base + adapter * size.adapter + of_bias * size.bias + lost

    return torch.maximum(_with_own(error, arithmetic), merged_bound(x, weight, bias, factors, scaling, arithmetic))


def merged_bound(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, scaling: float, arithmetic: Arithmetic
) -> Tensor:
    """The allowed |error| (n, d_out) of x (c (W + s B A))ᵀ + bias with the merged weight stored in the dtype.

    Also of c (x (W + s B A)ᵀ) and m (x ((W + s B A) / norm)ᵀ), where a factor is rounded in the output instead.
    """
    size = bounds.magnitudes(x, weight, bias, factors, scaling)
    exact, absolute = definition.merged_weight(weight, factors, scaling), x.double().abs()
    d_in, biased = factors.d_in, bias is not None

    def error(arithmetic: Arithmetic) -> Tensor:
        of = _computed(weight, factors, scaling, arithmetic)
        rounded = _merged_error(weight, factors, scaling, arithmetic, of)
        most = of.largest[:, None] * exact.abs() + rounded
        return (
            of.stray * (x.double() @ exact.T).abs()
            + absolute @ rounded.T
            + arithmetic.growth((d_in,), 1 + biased) * absolute @ most.T
            + arithmetic.growth((), 1, carried=d_in) * size.bias
            + arithmetic.underflow * (2 + of.largest) * size.underflow
        )

    return _with_own(error, arithmetic)


def merged_weight_bound(weight: Tensor, factors: Factors, scaling: float, arithmetic: Arithmetic) -> Tensor:
    """The allowed |error| (d_out, d_in) of the stored c (W + s B A)."""
    exact = definition.merged_weight(weight, factors, scaling).abs()

    def error(arithmetic: Arithmetic) -> Tensor:
        of = _computed(weight, factors, scaling, arithmetic)
        return of.stray[:, None] * exact + _merged_error(weight, factors, scaling, arithmetic, of)

    return _with_own(error, arithmetic)


def unmerged_weight_bound(weight: Tensor, factors: Factors, scaling: float, arithmetic: Arithmetic) -> Tensor:
    """The allowed |error| (d_out, d_in) of W = c (W + s B A) / c - s B A, for implementations that keep no copy of W.

    c is the same both times, so that its error is not in it but its roundings are: of the quotient and its inverse,
    and as the weight is multiplied by each. Infinite where c is zero.
    """
    plain = bounds.unmerged_weight(weight, factors, scaling, arithmetic)
    size = _size(weight, factors, scaling) + bounds.merged_weight(weight, factors, scaling, arithmetic)
    c = factor(weight, factors, scaling).abs()[:, None]
    # Of c and its inverse as they are stored and read, of what c multiplies, and at the end.
    lost = (_lost(factors, scaling) + 3 * size) / c + 2 * size * c + 3

    def error(arithmetic: Arithmetic) -> Tensor:
        last = 1 + arithmetic.growth((), 1, carried=factors.rank)
        return last * arithmetic.growth((), 4) * size + arithmetic.underflow * lost

    return plain + _with_own(error, arithmetic)


def gradient_bounds(
    x: Tensor,
    grad: Tensor,
    weight: Tensor,
    factors: Factors,
    scaling: float,
    arithmetic: Arithmetic,
    *,
    bias: Tensor | None,
) -> Gradients:
    """The allowed |error| of the gradients; of the bias dL/dm keeps a trace where it was taken from the base."""
    slopes = gradients(x, grad, weight, factors, scaling)
    unscaled = definition.gradients(x, grad, weight, factors, scaling)  # as if c were 1
    positive = grad.double().abs()

    def of_lora(
        reach: Tensor, roundings: int, arithmetic: Arithmetic, weight: Tensor = weight, factors: Factors = factors
    ) -> definition.Gradients:
        """The bounds of LoRA's gradients for a grad times `reach`, after further roundings."""
        scaled, growth = positive * reach, arithmetic.growth((), roundings)
        # grad is lost where it is read, before c, and where the product with c is stored.
        lost = arithmetic.underflow * (2 + float(reach.where(reach.isfinite(), 0).max()))
        known = bounds.gradients(x, scaled, weight, factors, scaling, replace(arithmetic, underflow=lost))
        size = definition.gradients(x.abs(), scaled, weight.abs(), factors.map(torch.abs), abs(scaling))
        return definition.Gradients(*((1 + growth) * own + growth * of for own, of in zip(known, size, strict=True)))

    def error(arithmetic: Arithmetic) -> Gradients:
        of = _computed(weight, factors, scaling, arithmetic)
        scaled = of_lora(of.largest, 2, arithmetic)  # the quotient, and c times grad
        # Also c - 1 and a sum, be it of grad and its product with that, or of c (W + s B A) and -W.
        through_base = of_lora(1 + of.from_one, 4, arithmetic, factors=factors.map(torch.zeros_like))
        through_b = of_lora(of.largest, 4, arithmetic, weight=torch.zeros_like(weight))
        moved = definition.gradients(x.abs(), of.stray * positive, weight, factors.map(torch.abs), abs(scaling))
        moved_x = (of.stray * positive) @ definition.merged_weight(weight, factors, scaling).abs()
        of_sum = _sum_error((x, weight, None, factors, scaling), bias, positive, arithmetic)
        return Gradients(
            a=scaled.a + moved.a,
            b=scaled.b + of.stray[:, None] * unscaled.b.abs(),
            x=through_base.x + through_b.x + moved_x,
            magnitude=of.relative * slopes.magnitude.abs() + of.inverse * of_sum,
        )

    own, definitions = error(arithmetic), error(FLOAT64)
    return Gradients(*(_known(one + other) for one, other in zip(own, definitions, strict=True)))


def _sum_error(
    layer: tuple[Tensor, Tensor, None, Factors, float], bias: Tensor | None, grad: Tensor, arithmetic: Arithmetic
) -> Tensor:
    """|error| (d_out,) of the sum over n of grad (x (W + s B A)ᵀ), and of its quotient, times the norm."""
    x, weight, _, factors, scaling = layer
    turned = bounds.either(*layer, arithmetic)
    of_weight, rows = _size(weight, factors, scaling), len(x)
    size = x.double().abs() @ of_weight.T
    # The bias added and taken away, times grad, summed, and the quotient.
    growth = arithmetic.growth((rows,), 3 + 2 * (bias is not None))
    left = arithmetic.growth((), 1, carried=factors.d_in) * (1 + arithmetic.growth((rows,), 5))
    of_bias = 0.0 if bias is None else left * bias.double().abs()
    lost = size.sum(0) + of_weight.sum(1) + norms(weight, factors, scaling) + rows + factors.d_in + 4
    error = (grad * ((1 + growth) * turned + growth * size + of_bias)).sum(0)
    return error + arithmetic.underflow * (abs(scaling) + 2) * lost


def _merged_error(weight: Tensor, factors: Factors, scaling: float, arithmetic: Arithmetic, of: Computed) -> Tensor:
    """|error| (d_out, d_in) of c (W + s B A) but for that of the norm: of the sum, of the quotient, of their product.

    c may also multiply W and s B A one by one, before they are added.
    """
    growth, known = arithmetic.growth((), 2), bounds.merged_weight(weight, factors, scaling, arithmetic)
    lost = arithmetic.underflow * (of.largest[:, None] + _lost(factors, scaling))
    return of.largest[:, None] * ((1 + growth) * known + growth * _size(weight, factors, scaling)) + lost


def _lost(factors: Factors, scaling: float) -> Tensor:
    """What one underflow in each number that c has multiplied adds up to in c (W + s B A), (d_out, d_in).

    That is c W, c times s, B or B A, and the direction, before it is times m.
    """
    a, b, s = factors.a.double().abs(), factors.b.double().abs(), abs(scaling)
    assert factors.magnitude is not None
    return b @ a + (s + 1) * (a.sum(0) + factors.rank) + (factors.magnitude.double().abs()[:, None] + 2)


def _size(weight: Tensor, factors: Factors, scaling: float) -> Tensor:
    """|W| + |s||B||A|: (d_out, d_in) in float64."""
    return definition.merged_weight(weight.abs(), factors.map(torch.abs), abs(scaling))


def _with_own(error: Callable[[Arithmetic], Tensor], arithmetic: Arithmetic) -> Tensor:
    """The error of a computation and that of the definition."""
    return _known(error(arithmetic) + error(FLOAT64))


def _known(allowed: Tensor) -> Tensor:
    """The bound, infinite where it is no number: where one factor of it is infinite and another zero."""
    return allowed.nan_to_num(nan=math.inf, posinf=math.inf)
