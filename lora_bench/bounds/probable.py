"""Bounds for layers of thousands of features: a rounding to storage is charged with what is stored.

The bounds of this package charge it with |W||x|, whatever the order of the sum. What is stored is the sum itself, which
grows with the root of its terms only: in bfloat16, of some thousand terms, |W||x| allows more than an adapter does.
Here each number that is stored is rounded by its own size (running error analysis: Higham, 2nd ed., section 3.3), and
what many such roundings add up to is `LIKELY` times the root of the sum of their squares (Higham and Mary 2019). Of up
to 16 that is the worst case. What happens within a sum is bounded as before, by `Arithmetic.growth`.

The parts of a split sum, where they are stored (on CUDA), are taken to be no larger than the sum itself and what its
terms add up to with signs at random. That is so for A and B that were drawn at random, and an assumption about W, for
which |W||x| is allowed if that is less. Shapes as in `lora_bench.definition`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lora_bench import bounds
from lora_bench.bounds.arithmetic import FLOAT64, LIKELY, Arithmetic
from lora_bench.definition import Gradients
from lora_bench.spec import Factors

if TYPE_CHECKING:
    from torch import Tensor


MOST = 10
"""More roundings than any number here goes through one after another."""


def separate(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, scaling: float, arithmetic: Arithmetic
) -> Tensor:
    """The allowed |error| (n, d_out) of base(x) + s (x Aᵀ) Bᵀ; see `lora_bench.bounds.separate`.

    Stored are the base, its sum with the bias, x Aᵀ, that times s, its product with B, that times s, and the sums; s
    may also have been multiplied into x, A or B.
    """
    size = bounds.magnitudes(x, weight, bias, factors, scaling)
    x, w, a, b, s = x.double(), weight.double(), factors.a.double(), factors.b.double(), abs(scaling)
    hidden, into_hidden, d_in, rank = x @ a.T, root(x, a), factors.d_in, factors.rank
    base, delta = x @ w.T, scaling * (x @ a.T) @ b.T
    stored = base.abs() + 3 * delta.abs() + (base + delta).abs()
    if bias is not None:
        stored = stored + (base + bias.double()).abs() + (base + delta + bias.double()).abs()
    many = 2 * s * root(hidden, b) + s * into_hidden @ b.abs().T
    parts: Tensor | float = 0.0
    if arithmetic.partials:
        parts = size.base.minimum(LIKELY * _parts(base, root(x, w))) + s * hidden.abs() @ b.abs().T
        parts = parts + LIKELY * s * root(_parts(hidden, into_hidden), b)
    sums = (
        _within(arithmetic, (d_in,), rank) * size.base
        + _within(arithmetic, (), d_in + rank) * size.bias
        + _within(arithmetic, (d_in, rank), d_in) * size.adapter
    )
    allowed = sums + arithmetic.unit * (stored + LIKELY * many + arithmetic.partials * parts)
    return _again(arithmetic, factors) * allowed + (arithmetic.underflow + FLOAT64.underflow) * size.underflow


def merged(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, scaling: float, arithmetic: Arithmetic
) -> Tensor:
    """The allowed |error| (n, d_out) of x (W + s B A)ᵀ + b with the merged weight stored in the dtype."""
    size = bounds.magnitudes(x, weight, bias, factors, scaling)
    x, a, b, s = x.double(), factors.a.double(), factors.b.double(), abs(scaling)
    d_in, rank = factors.d_in, factors.rank
    product = scaling * b @ a
    whole = weight.double() + product
    y = x @ whole.T
    stored = (x @ product.T).abs() + y.abs()
    if bias is not None:
        stored = stored + (y + bias.double()).abs()
    many = root(x, whole.abs() + 2 * product.abs()) + s * root(x @ a.T, b) + s * root(root(x, a), b)
    parts: Tensor | float = 0.0
    if arithmetic.partials:
        parts = (x.abs() @ whole.abs().T).minimum(LIKELY * _parts(y, root(x, whole)))
        parts = parts + LIKELY * root(x, s * b.abs() @ a.abs())
    sums = (
        _within(arithmetic, (d_in,), rank) * size.base
        + _within(arithmetic, (), d_in) * size.bias
        + _within(arithmetic, (d_in, rank)) * size.adapter
    )
    allowed = sums + arithmetic.unit * (stored + LIKELY * many + arithmetic.partials * parts)
    lost = size.underflow + x.abs() @ bounds.product_underflow(factors, scaling).T
    return _again(arithmetic, factors) * allowed + (arithmetic.underflow + FLOAT64.underflow) * lost


def merged_weight(weight: Tensor, factors: Factors, scaling: float, arithmetic: Arithmetic) -> Tensor:
    """The allowed |error| (d_out, d_in) of the stored W + s B A."""
    weight, product = weight.double(), _Product(factors, scaling, arithmetic)
    return _again(arithmetic, factors) * product.merging(weight) + product.lost


def unmerged_weight(weight: Tensor, factors: Factors, scaling: float, arithmetic: Arithmetic) -> Tensor:
    """The allowed |error| (d_out, d_in) of (W + s B A) - s B A, where no copy of W is kept."""
    weight, product = weight.double(), _Product(factors, scaling, arithmetic)
    # Taken away term by term, the product is still in the running total.
    carried = _within(arithmetic, (), factors.rank) * (weight.abs() + product.size)
    allowed = product.merging(weight) + product.error + arithmetic.unit * weight.abs() + carried
    return _again(arithmetic, factors) * allowed + 2 * product.lost


def strayed(x: Tensor, slack: Tensor) -> Tensor:
    """What x Wᵀ is off by (n, d_out) where each weight is by up to `slack` (d_out, d_in), independently."""
    return LIKELY * root(x.double(), slack)


def gradients(
    x: Tensor, grad: Tensor, weight: Tensor, factors: Factors, scaling: float, arithmetic: Arithmetic
) -> Gradients:
    """The allowed |error| of dL/dA, dL/dB and dL/dx, by way of x Aᵀ and grad B, or of W + s B A and gradᵀ x."""
    turned = Factors(factors.b.T, factors.a.T)
    of_x = separate(grad, weight.T, None, turned, scaling, arithmetic)
    of_x = of_x.maximum(merged(grad, weight.T, None, turned, scaling, arithmetic))
    x, grad, a, b, s = x.double(), grad.double(), factors.a.double(), factors.b.double(), abs(scaling)
    through_b, hidden, outer = grad @ b, x @ a.T, grad.T @ x
    (rows, d_out), again = grad.shape, _again(arithmetic, factors)

    def allowed(by: Tensor, most: Tensor, over: Tensor, into: Tensor, through: Tensor, terms: int) -> Tensor:
        """Of `by`ᵀ `over`: what is stored between (n, r), at most `most`, and what it is multiplied by (n, d)."""
        many = 2 * root(by.T, over.T) + into.T @ over.abs() + through
        parts = by.abs().T @ over.abs() + LIKELY * root(_parts(by, into).T, over.T) + LIKELY * through
        stored = 4 * (by.T @ over).abs() + LIKELY * many + arithmetic.partials * parts
        within = _within(arithmetic, (terms, rows)) * most.T @ over.abs()
        return again * s * (within + arithmetic.unit * stored)

    of_a = allowed(through_b, grad.abs() @ b.abs(), x, root(grad, b.T), root(b.T, outer.T), d_out)
    of_b = allowed(hidden, x.abs() @ a.abs().T, grad, root(x, a), root(a, outer), factors.d_in).T
    lost = arithmetic.underflow + FLOAT64.underflow
    underflow = bounds.gradient_underflow(x.abs(), grad.abs(), weight.double().abs(), factors, s)
    return Gradients(
        of_a + lost * underflow.a,
        of_b + lost * underflow.b,
        of_x + lost * underflow.x,
    )


def root(values: Tensor, matrix: Tensor) -> Tensor:
    """The root of the sum of the squares of the terms of `values` (n, k) times `matrix` (m, k) transposed: (n, m)."""
    return (values.square() @ matrix.square().T).sqrt()


def _parts(total: Tensor, spread: Tensor) -> Tensor:
    """The root of the sum of squares of the parts of a split sum, by its total and the `root` of its terms.

    The parts go the total's way, and scatter about it as sums of terms of any sign do.
    """
    return total.abs() + LIKELY * spread


class _Product:
    """s B A (d_out, d_in), its `size` |s||B||A|, and its `error`, where s may be multiplied into A or B before."""

    def __init__(self, factors: Factors, scaling: float, arithmetic: Arithmetic) -> None:
        a, b, s = factors.a.double(), factors.b.double(), abs(scaling)
        self.itself, self.size = scaling * b @ a, s * b.abs() @ a.abs()
        stored = 3 * self.itself.abs() + LIKELY * s * root(b, a.T) + arithmetic.partials * self.size
        self.error = _within(arithmetic, (factors.rank,)) * self.size + arithmetic.unit * stored
        self.lost = (arithmetic.underflow + FLOAT64.underflow) * bounds.product_underflow(factors, scaling)
        self._unit, self._carried = arithmetic.unit, _within(arithmetic, (), factors.rank)

    def merging(self, weight: Tensor) -> Tensor:
        """The |error| of W + s B A."""
        return self.error + self._unit * (weight + self.itself).abs() + self._carried * weight.abs()


def _within(arithmetic: Arithmetic, sums: tuple[int, ...], carried: int = 0) -> float:
    """The relative error within sums, as `Arithmetic.growth`, without what is rounded between; and the definition's."""
    return replace(arithmetic, partials=0).growth(sums, 0, carried) + FLOAT64.growth(sums, MOST, carried)


def _again(arithmetic: Arithmetic, factors: Factors) -> float:
    """What each error may be multiplied by in what comes after it."""
    return 1 + arithmetic.growth((max(factors.d_in, factors.d_out), factors.rank), MOST)
