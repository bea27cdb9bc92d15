"""NF4 with double quantisation: the 4-bit format of QLoRA, byte for byte as bitsandbytes packs it on a CPU.

Source: Dettmers et al. 2023, arXiv 2305.14314, section 3. Blocks of 64 values run over the flattened weight; each
keeps its absolute maximum in float32, or double-quantised: minus the mean of all, in groups of 256, in 8 bits.
The same torch operations run on every device. bitsandbytes' own CUDA kernels may differ from its CPU path: they
give all-zero blocks code 0 instead of 7 and round the 8-bit statistics to the nearest code without a grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lora_bench.bounds import Arithmetic

BLOCK = 64
NESTED_BLOCK = 256
# Quantiles of the normal distribution that divide it evenly, with an exact zero, over the largest (appendix E).
CODEBOOK = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    dtype=torch.float32,
    device="cpu",
)
SMALLEST_ABSMAX = 1e-38  # what a block is divided by at least
GRID = 65535  # steps from -1 to 1 to which a statistic is rounded before its nearest 8-bit code is looked up


def dynamic_map() -> Tensor:
    """The 256 values of the signed dynamic 8-bit type (Dettmers 2015, arXiv 1511.04561), ascending, float32.

    For each decade 10**-6 to 1, 1 to 64 means of neighbours on an even division of [0.1, 1], of both signs; 0 and 1.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
        decade = 10.0 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2
        values += decade.tolist() + (-decade).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


class Tables(NamedTuple):
    """What is looked up on one device."""

    borders: Tensor  # (15,) float32, half-way between neighbouring codes
    pairs: Tensor  # (256,) complex64: the high nibble's value, then the low one's
    nested_codes: Tensor  # (GRID + 1,) uint8, the nearest 8-bit code to each point of the grid
    nested_values: Tensor  # (256,) float32


@cache
def tables(device: torch.device) -> Tables:
    """The tables on `device`, made once."""
    byte, nested = torch.arange(256, device="cpu"), dynamic_map()
    grid = 2 * torch.arange(GRID + 1, dtype=torch.float32, device="cpu") / GRID - 1
    made = Tables(
        borders=(CODEBOOK[:-1] + CODEBOOK[1:]) / 2,
        pairs=torch.complex(CODEBOOK[byte >> 4], CODEBOOK[byte & 15]),
        nested_codes=torch.bucketize(grid, (nested[:-1] + nested[1:]) / 2).to(torch.uint8),
        nested_values=nested,
    )
    return Tables(*(table.to(device) for table in made))


@dataclass(frozen=True, eq=False)
class Nf4:
    """A weight in NF4. The high nibble of a byte is the earlier value; an odd length ends in a code for zero."""

    codes: Tensor  # (ceil(numel / 2),) uint8
    absmax: Tensor  # (ceil(numel / 64),) float32, or uint8 when double-quantised
    nested_absmax: Tensor | None  # (ceil(blocks / 256),) float32
    offset: Tensor | None  # () float32, the mean that was taken from absmax
    shape: torch.Size

    @property
    def scale(self) -> Tensor:
        """What each block of 64 is multiplied by: (ceil(numel / 64),) float32."""
        if self.nested_absmax is None or self.offset is None:
            return self.absmax
        values = tables(self.absmax.device).nested_values.index_select(0, self.absmax.int())
        return values * self.nested_absmax.repeat_interleave(NESTED_BLOCK)[: values.numel()] + self.offset

    @property
    def bits_per_parameter(self) -> float:
        """All that is stored over all that is represented: 4.127 for a large weight, 4.5 without double."""
        stored = (self.codes, self.absmax, self.nested_absmax, self.offset)
        return 8 * sum(tensor.nbytes for tensor in stored if tensor is not None) / self.shape.numel()


@torch.no_grad()
def quantise(weight: Tensor, *, double: bool = True) -> Nf4:
    """Round `weight`, of any shape, to NF4 in blocks of 64, its statistics to 8 bits where `double`.

    A float64 weight is rounded to float32 first. Raises TypeError when it is not floating point, ValueError when it
    is empty or not finite, or when its statistics overflow float32 (bitsandbytes would store NaN).
    """
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating point, got {weight.dtype}")
    values = weight.flatten().float()
    if values.numel() == 0:
        raise ValueError(f"weight must hold at least one value, got shape {tuple(weight.shape)}")
    if not values.isfinite().all():
        raise ValueError(f"weight must be finite in float32, got {int((~values.isfinite()).sum())} values that are not")
    absmax, scaled = normalise(values)
    # A value on the border of two codes takes the lower one.
    codes = torch.bucketize(functional.pad(scaled, (0, scaled.numel() % 2)), tables(weight.device).borders)
    packed = (codes[::2] << 4 | codes[1::2]).to(torch.uint8)
    if not double:
        return Nf4(packed, absmax, None, None, weight.shape)
    offset = absmax.mean()
    nf4 = Nf4(packed, *quantise_statistics(absmax - offset), offset, weight.shape)
    if not nf4.scale.isfinite().all():
        raise ValueError(f"weight is too large for double quantisation: its block maxima average {offset.item()}")
    return nf4


def normalise(values: Tensor) -> tuple[Tensor, Tensor]:
    """The absolute maximum of each block of 64, and `values` (n,) over it, in [-1, 1]."""
    full = values.numel() // BLOCK * BLOCK
    blocks, rest = values[:full].view(-1, BLOCK), values[full:]
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1 / absmax.clamp(min=SMALLEST_ABSMAX)).unsqueeze(1)).flatten()
    if rest.numel():  # bitsandbytes divides in the last block when it is shorter, and keeps its clamped maximum
        last = rest.abs().amax().clamp(min=SMALLEST_ABSMAX)
        absmax, scaled = torch.cat([absmax, last.unsqueeze(0)]), torch.cat([scaled, rest / last])
    return absmax, scaled.clamp(-1, 1)


def quantise_statistics(centred: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit codes (n,) of the centred block maxima, and the absolute maximum of each 256 of them."""
    groups = functional.pad(centred, (0, -centred.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    absmax = groups.abs().amax(1)
    # 0 · 1/0 is NaN: a group without spread takes code 0.
    scaled = (groups * (1 / absmax).unsqueeze(1)).nan_to_num(nan=-1.0).clamp(-1, 1)
    nearest = ((scaled + 1) * 0.5 * GRID + 0.5).int()
    return tables(centred.device).nested_codes[nearest].flatten()[: centred.numel()], absmax


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """The float32 values of whole blocks, of any shape (..., 64 · blocks): what their bytes stand for, times `scale`.

    Where `codes` (..., bytes) end before the last block does, what follows is undefined.
    """
    pairs = torch.empty(scale.numel() * BLOCK // 2, dtype=torch.complex64, device=codes.device)
    # One complex number per byte: the fastest lookup of two floats that torch has.
    torch.index_select(tables(codes.device).pairs, 0, codes.int().flatten(), out=pairs[: codes.numel()])
    values = torch.view_as_real(pairs).view(-1, BLOCK).mul_(scale.reshape(-1, 1))
    return values.view(*scale.shape[:-1], -1)


@torch.no_grad()
def dequantise(nf4: Nf4, dtype: torch.dtype) -> Tensor:
    """The weight that `nf4` stands for, in its shape: the product in float32, rounded once to `dtype`."""
    return decode(nf4.codes, nf4.scale)[: nf4.shape.numel()].to(dtype).view(nf4.shape)


def half_step(values: Tensor) -> float:
    """The furthest that a number in [-1, 1] can be from the nearest of `values`, which ascend to 1."""
    values = values.double()
    return max(float(values.diff().max()) / 2, float(values[0]) + 1)


@torch.no_grad()
def block_bound(weight: Tensor, dtype: torch.dtype, *, double: bool = True) -> Tensor:
    """The allowed |weight - dequantised| of an honest NF4 quantiser that gives `dtype`: float64, in weight's shape.

    For a block with absolute maximum m: m times half the widest gap between codes, the error of the stored m (its
    distance from the mean, in 8 bits), and roundings. Raises what `quantise` raises; overflow is outside of it.
    """
    arithmetic, stored = Arithmetic.of(torch.float32), Arithmetic.of(dtype)
    unit = arithmetic.unit
    absmax = quantise(weight, double=False).absmax
    exact = absmax.double()
    error = torch.zeros_like(exact)
    if double:
        _, nested = quantise_statistics(absmax - absmax.mean())
        spread = nested.double().repeat_interleave(NESTED_BLOCK)[: exact.numel()]
        # 16 roundings of the spread: as below, to the grid (6), of its points (2), of the centring and the product.
        error = (half_step(dynamic_map()) + 1 / GRID + 16 * unit) * spread + 2 * unit * exact
    # The code is chosen after a reciprocal (4: above 2**126 it is subnormal), a product, and with a rounded border.
    bound = (half_step(CODEBOOK) + 6 * unit) * exact + error
    bound += ((1 + unit) * (1 + stored.unit) - 1) * (exact + error)
    # Maxima below the normal range, of a block or of a group of them, may be lost as a whole.
    bound += 3 * arithmetic.underflow + stored.underflow
    per_value = bound.repeat_interleave(BLOCK)[: weight.numel()].view(weight.shape)
    return per_value + unit * weight.double().abs()  # a float64 weight is rounded first
