"""The words of LoRA: what an adapter is asked to be (`LoraSpec`) and what it holds (`Factors`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class LoraSpec:
    """One adapter's hyper-parameters, by PEFT's and the papers' names.

    `alpha` is the numerator of the scaling: alpha / r (Hu et al. 2021, arXiv 2106.09685, section 4.1),
    or alpha / sqrt(r) with `rslora` (Kalajdzievski 2023, arXiv 2312.03732). A rank above min(d_in, d_out) is legal.
    With `dora` the sum W + s B A is only a direction, with a magnitude of its own (Liu et al. 2024, arXiv 2402.09353);
    with `lora_bias` B has a bias, which is scaled as B A x is.

    Raises ValueError for a rank below 1, an alpha that is not finite, a dropout outside [0, 1).
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    lora_bias: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool):
            raise TypeError(f"rank must be an integer, got {self.rank!r}")
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha must be finite, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def scaling(self) -> float:
        """What multiplies B A: alpha / r, or alpha / sqrt(r) with `rslora`."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def parameters(self, d_in: int, d_out: int) -> int:
        """How many numbers one d_in -> d_out layer trains: r (d_in + d_out), and d_out for each vector of its own."""
        return self.rank * (d_in + d_out) + (self.dora + self.lora_bias) * d_out


@dataclass(frozen=True, eq=False)
class Factors:
    """The two matrices of one adapter: `a` of shape (r, d_in) and `b` of shape (d_out, r).

    `bias` (d_out,) is that of B, with `lora_bias`, and `magnitude` (d_out,) that of DoRA. Of a convolution `a` is the
    flattened kernel, d_in being its channels times its places; of an embedding d_in is the vocabulary.

    Raises ValueError when the shapes do not fit together, TypeError when the dtypes differ or are not floating.
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None = None
    magnitude: Tensor | None = None

    def __post_init__(self) -> None:
        for name, factor in (("a", self.a), ("b", self.b)):
            if factor.ndim != 2:
                raise ValueError(f"factor {name} must be a matrix, got shape {tuple(factor.shape)}")
            if not factor.is_floating_point() or factor.dtype.itemsize == 1:
                raise TypeError(f"factor {name} must be of a 16-, 32- or 64-bit floating dtype, got {factor.dtype}")
        if self.a.shape[0] != self.b.shape[1]:
            raise ValueError(
                "factors must share a rank: a is (r, d_in) and b is (d_out, r), "
                f"got a {tuple(self.a.shape)} and b {tuple(self.b.shape)}"
            )
        if self.a.dtype != self.b.dtype:
            raise TypeError(f"factors must share a dtype, got a {self.a.dtype} and b {self.b.dtype}")
        for name, vector in (("bias", self.bias), ("magnitude", self.magnitude)):
            if vector is not None and vector.shape != (self.d_out,):
                raise ValueError(f"factor {name} must be of shape ({self.d_out},), got {tuple(vector.shape)}")

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def d_in(self) -> int:
        return self.a.shape[1]

    @property
    def d_out(self) -> int:
        return self.b.shape[0]

    def blocks(self, groups: int) -> list[Tensor]:
        """The (d_out / groups, r / groups) blocks on the diagonal of b: all that B is in a convolution with groups.

        Raises ValueError for a b that is not zero outside of them.
        """
        if groups == 1:
            return [self.b]
        blocks = [rows.chunk(groups, 1)[group] for group, rows in enumerate(self.b.chunk(groups))]
        if sum(int(block.count_nonzero()) for block in blocks) != int(self.b.count_nonzero()):
            raise ValueError(f"factor b must be zero outside its {groups} groups")
        return blocks

    def map(self, change: Callable[[Tensor], Tensor]) -> Factors:
        """These factors with `change` made to each tensor."""
        bias = None if self.bias is None else change(self.bias)
        magnitude = None if self.magnitude is None else change(self.magnitude)
        return Factors(change(self.a), change(self.b), bias, magnitude)

    def to(self, dtype: torch.dtype) -> Factors:
        """These factors in another dtype; ValueError for one that cannot hold their values."""
        converted = self.map(lambda tensor: tensor.to(dtype))
        for name in ("a", "b", "bias", "magnitude"):
            before, after = getattr(self, name), getattr(converted, name)
            if before is None or before.dtype == dtype:  # to look at the values waits for a GPU
                continue
            lost = before[before.isfinite() & ~after.isfinite()]
            if len(lost):
                raise ValueError(f"{dtype} cannot hold factor {name}: it has the value {float(lost[0]):g}")
        return converted

    def fit(self, rank: int, d_in: int, d_out: int) -> None:
        """Raise ValueError unless these are the factors of a rank-`rank` adapter of a d_in -> d_out layer."""
        if (self.rank, self.d_in, self.d_out) != (rank, d_in, d_out):
            raise ValueError(
                f"factors must be a ({rank}, {d_in}) and b ({d_out}, {rank}) here, "
                f"got a {tuple(self.a.shape)} and b {tuple(self.b.shape)}"
            )
