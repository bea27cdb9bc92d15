"""bitsandbytes' Linear4bit as a base layer, NF4 with double quantisation as in QLoRA (arXiv 2305.14314)."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from lora_bench.subjects import quiet_import

with quiet_import():
    import bitsandbytes

# Its dequantising is compiled by torch, which says at length when many shapes have made it give up; the result is the
# same, and a run over many small shapes always gets there.
logging.getLogger("torch._dynamo.convert_frame").addFilter(
    lambda record: not all(part in record.getMessage() for part in ("recompile_limit", "_dequantize_4bit"))
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def linear4bit(linear: nn.Linear) -> nn.Module:
    """A frozen Linear4bit with the quantised weight of `linear`, on its device, computing in its dtype.

    bitsandbytes' path for CPUs with AVX512-BF16 is switched off: in eval mode its first forward repacks the weight in
    place and computes in bfloat16 whatever the compute dtype, and dequantising (so PEFT's merge too) is wrong after it.

    Raises TypeError for a dtype other than fp32, bf16 and fp16.
    """
    if linear.weight.dtype not in _DTYPES:
        raise TypeError(f"bitsandbytes quantises {', '.join(map(str, _DTYPES))}, got {linear.weight.dtype}")
    with torch.device("meta"):
        layer = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=linear.weight.dtype, quant_type="nf4"
        )
    layer.weight = bitsandbytes.nn.Params4bit(
        linear.weight.detach(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
    )
    layer.bias = linear.bias
    layer.support_avx512bf16_for_cpu = False
    frozen: nn.Module = layer.to(linear.weight.device).requires_grad_(False)
    return frozen


def dequantise(layer: Any) -> Tensor:
    """The weight that a Linear4bit multiplies by: (d_out, d_in), in its compute dtype.

    Raises RuntimeError for a layer that bitsandbytes has repacked for AVX512-BF16, whose values it gives back wrongly.
    """
    weight = layer.weight
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        raise RuntimeError("bitsandbytes has repacked this layer for the CPU and cannot dequantise it")
    values: Tensor = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    return values.to(layer.compute_dtype)
