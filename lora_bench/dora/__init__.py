"""DoRA (Liu et al. 2024, arXiv 2402.09353): its definition in float64, and how far one may stray."""

from __future__ import annotations

from lora_bench.dora.bounds import (
    gradient_bounds,
    merged_bound,
    merged_weight_bound,
    norm_bound,
    separate_bound,
    unmerged_weight_bound,
)
from lora_bench.dora.definition import Gradients, forward, gradients, merged_weight, norms

__all__ = [
    "Gradients",
    "forward",
    "gradient_bounds",
    "gradients",
    "merged_bound",
    "merged_weight",
    "merged_weight_bound",
    "norm_bound",
    "norms",
    "separate_bound",
    "unmerged_weight_bound",
]
