"""Known failures that are the same for every kind of convolution."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_bench.case import DIMENSIONS
from lora_bench.subject import Known

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_bench.case import Case


def convolutions(
    check: str, because: str, shape: str = "{}", where: Callable[[Case], bool] | None = None
) -> dict[str, Known]:
    """The failure of one check for each kind; `shape` is what its case says besides the sizes, {} being the kind."""
    return {
        f"{check}@{kind}": Known(because, f"t1 i1 o1 r1 a1 fp64 s0 {shape.format(kind)}", where) for kind in DIMENSIONS
    }


def padded_otherwise(case: Case) -> bool:
    """Whether x is padded with other numbers than zeros."""
    return case.padding > 0 and case.padding_mode != "zeros"
