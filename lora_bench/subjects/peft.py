"""PEFT, Hugging Face's library: its LoRA layers, made and driven through its public functions and at its defaults.

One default shows in every 16-bit model: `autocast_adapter_dtype=True` keeps A and B in float32 and casts the
activations to it around them, which costs time and rounds less.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from lora_bench.spec import Factors
from lora_bench.subject import Subject
from lora_bench.subjects import quiet_import

with quiet_import():
    from peft import LoraConfig, get_peft_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    from lora_bench.spec import LoraSpec

ADAPTER = "default"
BASE = "__base__"


class Box(nn.Module):
    """A model of one layer: PEFT replaces the children of a model, never the model itself."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        # What PEFT asks of a model, and not of its layers, before it wraps a 4-bit one.
        self.is_loaded_in_4bit = _is_4bit(layer)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


class Plan(NamedTuple):
    """The adapters' names, one for each row as PEFT wants them, and the highest id among them."""

    names: list[str]
    highest: int


def wrap(base: nn.Module, spec: LoraSpec) -> LoraLayer:
    """The layer that PEFT puts in the base's place."""
    return _tuner(get_peft_model(Box(base), _config(spec), adapter_name=ADAPTER))


def load(layer: LoraLayer, factors: Factors, adapter: str = ADAPTER) -> None:
    """Copy the factors in, as PEFT's own loader does; while merged PEFT takes no notice of them."""
    factors.fit(layer.r[adapter], layer.in_features, layer.out_features)
    with torch.no_grad():
        layer.lora_A[adapter].weight.copy_(factors.a)
        layer.lora_B[adapter].weight.copy_(factors.b)


def merge(layer: LoraLayer) -> None:
    """W + s B A in place; a 4-bit base is quantised again."""
    with _quiet_rounding():
        layer.merge()


def unmerge(layer: LoraLayer) -> None:
    """Subtract s B A from the merged weight, which restores W but for rounding; a 4-bit base is quantised anew."""
    with _quiet_rounding():
        layer.unmerge()


def merge_and_unload(layer: LoraLayer) -> nn.Module:
    """The base layer with the adapter merged into it, as PEFT's own `merge_and_unload` leaves it."""
    if not layer.merged:
        merge(layer)
    base: nn.Module = layer.get_base_layer()
    return base


def weight(layer: LoraLayer) -> Tensor:
    """The base layer's weight (d_out, d_in), dequantised."""
    base = layer.get_base_layer()
    if _is_4bit(base):
        from lora_bench.subjects.bitsandbytes import dequantise

        return dequantise(base)
    dense: Tensor = base.weight.detach()
    return dense


def pool(layer: LoraLayer, adapters: Sequence[tuple[LoraSpec, Factors]]) -> LoraLayer:
    """A second layer of PEFT's over the same base, with the adapters under the names "0", "1", and so on.

    The layer's own adapter is left alone and takes no part, and several pools of one layer do not see each other.

    Raises ValueError where there is none, or one that does not fit the layer.
    """
    if not adapters:
        raise ValueError("a pool needs at least one adapter, got none")
    (first, _), *others = adapters
    model = get_peft_model(Box(layer.get_base_layer()), _config(first), adapter_name="0")
    for index, (spec, _) in enumerate(others, start=1):
        model.add_adapter(str(index), _config(spec))
    pooled = _tuner(model)
    for index, (_, factors) in enumerate(adapters):
        load(pooled, factors, str(index))
    return pooled.requires_grad_(False).eval()


def plan(ids: Tensor, _device: torch.device | str) -> Plan:
    """The adapters' names for ids (n,), which PEFT wants as a list on the host whatever the device.

    Raises ValueError for an id below -1.
    """
    listed = ids.tolist()
    if min(listed, default=-1) < -1:
        raise ValueError(f"adapter ids start at -1 (no adapter), got {min(listed)}")
    return Plan([BASE if index < 0 else str(index) for index in listed], max(listed, default=-1))


def route(layer: LoraLayer, pool: LoraLayer, x: Tensor, plan: Plan) -> Tensor:
    """PEFT's mixed batch, which is for inference only.

    Raises IndexError for an id that the pool has no adapter for, since PEFT's layers take an unknown name for the
    base, and RuntimeError while the layer's own adapter is merged into the base.
    """
    if plan.highest >= len(pool.lora_A):
        raise IndexError(f"adapter id {plan.highest} is not in the pool of {len(pool.lora_A)}")
    if layer.merged:
        raise RuntimeError("unmerge before routing: the base would carry the merged adapter in every row")
    y: Tensor = pool(x, adapter_names=plan.names)
    return y


def _config(spec: LoraSpec) -> LoraConfig:
    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        use_rslora=spec.rslora,
        target_modules=["layer"],
    )


def _tuner(model: PeftModel) -> LoraLayer:
    return model.get_base_model().layer


def _is_4bit(layer: nn.Module) -> bool:
    return any(cls.__module__.startswith("bitsandbytes.") for cls in type(layer).__mro__)


@contextmanager
def _quiet_rounding() -> Iterator[None]:
    """PEFT warns at every merge into a 4-bit base that it rounds; here that is measured instead."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(Merge|Unmerge) lora module to 4-bit linear")
        yield


PEFT = Subject(
    "peft",
    wrap,
    load,
    factors=lambda layer: Factors(layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight),
    merge=merge,
    unmerge=unmerge,
    merge_and_unload=merge_and_unload,
    enable=lambda layer, enabled: layer.enable_adapters(enabled),
    weight=weight,
    state=lambda layer: {name: value for name, value in layer.state_dict().items() if name.startswith("lora_")},
    pool=pool,
    plan=plan,
    route=route,
    layers=("linear", "linear4bit"),
)
