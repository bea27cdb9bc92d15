"""DoRA, W + s B A as a direction with a magnitude of its own: its definition in float64.

y = c (x (W + s B A)ᵀ) + bias, row o of the weight being times c_o = m_o / ||(W + s B A)_o||. The norm is that of each
output's weights, as in PEFT, and m begins as that of W, so that a fresh layer is its base; the bias is not scaled.
Source: Liu et al. 2024, arXiv 2402.09353, equation 5; by section 4.3 the norm is a constant to the gradients.
Shapes are those of `lora_bench.definition`, with m in `Factors.magnitude`. Where a row of W + s B A is zero the
definition has no value (NaN).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lora_bench import definition

if TYPE_CHECKING:
    from torch import Tensor

    from lora_bench.spec import Factors


class Gradients(NamedTuple):
    """dL/dA (r, d_in), dL/dB (d_out, r), dL/dx (n, d_in) and dL/dm (d_out,), in float64."""

    a: Tensor
    b: Tensor
    x: Tensor
    magnitude: Tensor


def norms(weight: Tensor, factors: Factors, scaling: float) -> Tensor:
    """||W + s B A|| of each output: (d_out,) in float64."""
    return definition.merged_weight(weight, factors, scaling).norm(dim=1)


def factor(weight: Tensor, factors: Factors, scaling: float) -> Tensor:
    """c = m / ||W + s B A||: (d_out,) in float64. Raises ValueError for factors without a magnitude."""
    if factors.magnitude is None:
        raise ValueError("factors of DoRA must have a magnitude, got None")
    return factors.magnitude.double() / norms(weight, factors, scaling)


def merged_weight(weight: Tensor, factors: Factors, scaling: float) -> Tensor:
    """c (W + s B A): (d_out, d_in) in float64."""
    return factor(weight, factors, scaling)[:, None] * definition.merged_weight(weight, factors, scaling)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, scaling: float) -> Tensor:
    """y = c (x (W + s B A)ᵀ) + bias: (n, d_out) in float64."""
    return definition.base(x, merged_weight(weight, factors, scaling), bias)


def gradients(x: Tensor, grad: Tensor, weight: Tensor, factors: Factors, scaling: float) -> Gradients:
    """The gradients of a loss L whose dL/dy is `grad` (n, d_out), the norm being a constant.

    With g = c grad: dL/dA = s (g B)ᵀ x,  dL/dB = s gᵀ (x Aᵀ),  dL/dx = g (W + s B A), and
    dL/dm = sum over n of grad (x (W + s B A)ᵀ) / ||W + s B A||.
    """
    scaled = grad.double() * factor(weight, factors, scaling)
    turned = definition.forward(x, weight, None, factors, scaling)
    return Gradients(
        *definition.gradients(x, scaled, weight, factors, scaling),
        magnitude=(grad.double() * turned).sum(0) / norms(weight, factors, scaling),
    )
