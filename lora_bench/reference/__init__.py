"""REFERENCE: our own LoRA, short enough to be read as its definition in code."""

from __future__ import annotations

from lora_bench.reference.batched import plan, pool, route
from lora_bench.reference.four_bit import Nf4Linear
from lora_bench.reference.layer import LoraLinear, dense_weight
from lora_bench.subject import Subject

__all__ = ["REFERENCE", "LoraLinear", "Nf4Linear"]

REFERENCE = Subject(
    "reference",
    wrap=LoraLinear,
    load=LoraLinear.load,
    factors=lambda layer: layer.factors,
    merge=LoraLinear.merge,
    unmerge=LoraLinear.unmerge,
    merge_and_unload=LoraLinear.merge_and_unload,
    enable=LoraLinear.enable,
    weight=lambda layer: dense_weight(layer.base_layer),
    state=LoraLinear.adapter_state,
    pool=pool,
    plan=plan,
    route=route,
    layers=("linear", "nf4"),
)
