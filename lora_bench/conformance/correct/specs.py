"""What these implementations say of a spec that they do not do."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_bench.spec import LoraSpec


def finite(scaling: float) -> float:
    """The scaling, which must be a number: some builds of torch.addmm take an alpha of NaN for 1.

    Raises ValueError where it is not.
    """
    if not math.isfinite(scaling):
        raise ValueError(f"scaling must be finite, got {scaling}")
    return scaling


def undropped(spec: LoraSpec) -> str | None:
    """Any spec where base and adapter share one input, so that no dropout can act on the adapter's alone."""
    return "no dropout: base and adapter share their input" if spec.dropout else None
