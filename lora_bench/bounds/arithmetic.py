"""`Arithmetic`: how a dtype rounds on a device, and how far a chain of roundings may carry a number.

Source: Higham, Accuracy and Stability of Numerical Algorithms (2nd ed.), section 3.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
FP32_OPERANDS = {"tf32": 2.0**-11, "bf16": 2.0**-8}
"""What a float32 matrix product rounds its inputs to, by the names of torch's setting `fp32_precision`."""


LIKELY = 4
"""So many times the root of their number, or of the sum of their squares, are independent roundings taken to add up."""


@dataclass(frozen=True)
class Arithmetic:
    """The rounding of one dtype on one device.

    `unit` is the unit roundoff of storage, `accumulator` that of a sum's running total, `operand` what a matrix
    product rounds its inputs to (TF32, else 0), `partials` how often a reduced-precision reduction rounds partial sums
    to storage, `underflow` the largest absolute error of a product that falls out of the normal range.
    `probabilistic` replaces the worst case n·ua of a sum of n terms by 4·sqrt(n)·ua (Higham and Mary 2019, A New
    Approach to Probabilistic Rounding Error Analysis), for sums of thousands of terms.
    """

    unit: float
    accumulator: float
    underflow: float
    operand: float = 0.0
    partials: int = 0
    probabilistic: bool = False

    @classmethod
    def of(cls, dtype: torch.dtype, device: str = "cpu", *, probabilistic: bool = False) -> Arithmetic:
        """The arithmetic that torch's present settings give `dtype` on `device` ("cpu" or "cuda").

        Raises TypeError for a dtype without a known unit roundoff.
        """
        if dtype not in UNIT_ROUNDOFF:
            known = ", ".join(str(known) for known in UNIT_ROUNDOFF)
            raise TypeError(f"bounds are known for {known}, got {dtype}")
        unit, narrow, cuda = UNIT_ROUNDOFF[dtype], dtype.itemsize == 2, torch.backends.cuda.matmul
        on_cuda, half = device.startswith("cuda"), dtype == torch.float16
        reduced = cuda.allow_fp16_reduced_precision_reduction if half else cuda.allow_bf16_reduced_precision_reduction
        wide, smallest = UNIT_ROUNDOFF[torch.float32] if narrow else unit, torch.finfo(dtype).smallest_normal
        return cls(
            unit=unit,
            accumulator=unit if on_cuda and half and cuda.allow_fp16_accumulation else wide,
            # bf16 and fp32 products may flush subnormals (AMX and AVX512-BF16 do); fp16 and fp64 keep them, and half
            # of fp64's smallest is no float any more.
            underflow=max(math.ulp(0.0), smallest * (1 if dtype in (torch.float32, torch.bfloat16) else unit)),
            operand=FP32_OPERANDS.get(_fp32_precision(on_cuda), 0.0) if dtype == torch.float32 else 0.0,
            # split-K: one rounding as a partial sum is stored and one as it is added.
            partials=2 if on_cuda and narrow and reduced else 0,
            probabilistic=probabilistic,
        )

    def gamma(self, terms: int) -> float:
        """γₙ = n·ua / (1 - n·ua), the relative error of a sum of `terms` products (Higham, equation 3.4)."""
        spread = (LIKELY * math.sqrt(terms) if self.probabilistic else terms) * self.accumulator
        return spread / (1 - spread)

    def growth(self, sums: tuple[int, ...], roundings: int, carried: int = 0) -> float:
        """The relative error of a value after products over `sums` terms each and `roundings` roundings to storage.

        `carried` further terms are added to a running total that holds it.
        """
        logarithm = (roundings + self.partials * len(sums)) * math.log1p(self.unit)
        logarithm += 2 * len(sums) * math.log1p(self.operand)
        logarithm += sum(math.log1p(self.gamma(terms)) for terms in (*sums, carried))
        return math.expm1(logarithm)  # 1 + 2⁻⁵³ would be 1


def _fp32_precision(on_cuda: bool) -> str:
    """What torch is set to round float32 inputs of a matrix product to: its most particular setting decides."""
    backends = torch.backends
    mkldnn: Any = backends.mkldnn
    homes = (backends.cuda.matmul, backends) if on_cuda else (mkldnn.matmul, mkldnn, backends)
    return next((home.fp32_precision for home in homes if home.fp32_precision != "none"), "none")


FLOAT64 = Arithmetic.of(torch.float64)
