"""How far a computation has strayed, beside what it may."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor


class Deviation(NamedTuple):
    """Where a computation strays furthest, as a multiple of what it may: at its index, the values, and `ratio`."""

    at: tuple[int, ...]
    found: float
    wanted: float
    error: float
    allowed: float

    @property
    def ratio(self) -> float:
        """error / allowed: above 1 the computation is not an honest rounding of the definition."""
        if self.error == 0:
            return 0.0
        # Not by <=: an infinite error is within no bound, and nothing is within one that is no number.
        return self.error / self.allowed if self.allowed > 0 and math.isfinite(self.error) else math.inf


@torch.no_grad()
def worst(found: Tensor, wanted: Tensor, allowed: Tensor | float = 0.0) -> Deviation:
    """Where |found - wanted| is largest beside `allowed` (0: must be equal); a NaN that was not wanted is infinite.

    Raises ValueError when the shapes differ.
    """
    if found.shape != wanted.shape:
        raise ValueError(f"shapes differ: found {tuple(found.shape)}, wanted {tuple(wanted.shape)}")
    if found.numel() == 0:
        return Deviation((), 0.0, 0.0, 0.0, 0.0)
    found, wanted = found.double(), wanted.double()
    limit = torch.as_tensor(allowed, dtype=torch.float64, device=wanted.device).broadcast_to(wanted.shape)
    error = (found - wanted).abs()
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    error = error.masked_fill(same, 0.0).nan_to_num(nan=math.inf, posinf=math.inf)
    ratio = (error / limit).masked_fill(same, 0.0).nan_to_num(nan=math.inf, posinf=math.inf)
    place = int(ratio.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), wanted.shape))
    return Deviation(index, *(float(values.flatten()[place]) for values in (found, wanted, error, limit)))


@torch.no_grad()
def visibility(effect: Tensor, allowed: Tensor) -> float:
    """How surely a dropped adapter would be seen: the largest |effect| / (2·allowed); at 1 or less it could pass."""
    return float((effect.abs() / (2 * allowed)).nan_to_num().max()) if effect.numel() else 0.0
