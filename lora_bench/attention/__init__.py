"""LoRA on nn.MultiheadAttention: its definition in float64, and how far an honest computation may stray from it."""

from __future__ import annotations

from lora_bench.attention.bounds import Estimate, bound, gradient_bounds, merged_bound, product, softmax
from lora_bench.attention.definition import Adapted, Attended, Gradients, Inputs, Projection, forward, gradients

__all__ = [
    "Adapted",
    "Attended",
    "Estimate",
    "Gradients",
    "Inputs",
    "Projection",
    "bound",
    "forward",
    "gradient_bounds",
    "gradients",
    "merged_bound",
    "product",
    "softmax",
]
