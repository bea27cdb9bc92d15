"""PEFT, Hugging Face's library: its LoRA layers, made and driven through its public functions and at its defaults.

One default shows in every 16-bit model: `autocast_adapter_dtype=True` keeps A and B in float32 and casts the
activations to it around them, which costs time and rounds less.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_bench.spec import Factors
from lora_bench.subject import Known, Subject
from lora_bench.subjects import quiet_import
from lora_bench.subjects.one_layer import OneLayer
from lora_bench.subjects.peft_attention import KNOWN as ATTENTION
from lora_bench.subjects.peft_attention import MultiheadAttention, halves

with quiet_import():
    from peft import LoraConfig, get_peft_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    from lora_bench.case import Case
    from lora_bench.spec import LoraSpec

ADAPTER = "default"
BASE = "__base__"


class Box(OneLayer):
    """What PEFT can adapt: it replaces the children of a model, never the model itself."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        # What PEFT asks of a model, and not of its layers, before it wraps a quantised one.
        kind = _bitsandbytes(layer)
        self.is_loaded_in_4bit = kind == "Linear4bit"
        self.is_loaded_in_8bit = kind == "Linear8bitLt"
        if _is_torchao(layer):
            from lora_bench.subjects.torchao import CONFIG

            config = SimpleNamespace(get_apply_tensor_subclass=lambda: CONFIG)
            self.hf_quantizer = SimpleNamespace(quantization_config=config)


class Plan(NamedTuple):
    """The adapters' names, one for each row as PEFT wants them, and the highest id among them."""

    names: list[str]
    highest: int


def wrap(base: nn.Module, spec: LoraSpec) -> LoraLayer:
    """The layer that PEFT puts in the base's place; NotImplementedError for what it says that it does not do."""
    if spec.lora_bias and _is_torchao(base):
        raise NotImplementedError("PEFT has no lora_bias over torchao's weights")
    return tuner(get_peft_model(Box(base), config(spec), adapter_name=ADAPTER))


def load(layer: LoraLayer, factors: Any, adapter: str = ADAPTER) -> None:
    """Copy the factors in, as PEFT's own loader does; while merged PEFT takes no notice of them."""
    if isinstance(layer, MultiheadAttention):
        for half, own in zip(halves(layer), factors, strict=True):
            _load(half, own, adapter)
    else:
        _load(layer, factors, adapter)


def _load(layer: LoraLayer, factors: Factors, adapter: str) -> None:
    a, b = parameters(layer, adapter)
    rank, d_in = a.flatten(1).shape
    factors.fit(rank, d_in, len(b))
    with torch.no_grad():
        a.copy_(factors.a.view_as(a))
        b.copy_(torch.cat(factors.blocks(groups(layer))).reshape(b.shape))
        if factors.bias is not None:
            layer.lora_B[adapter].bias.copy_(factors.bias)
        if factors.magnitude is not None:
            layer.lora_magnitude_vector[adapter].weight.copy_(factors.magnitude)


def factors(layer: LoraLayer, adapter: str = ADAPTER) -> Any:
    """The live parameters, those of a convolution as matrices; the blocks of several groups make none."""
    if isinstance(layer, MultiheadAttention):
        return tuple(_factors(half, adapter) for half in halves(layer))
    return _factors(layer, adapter)


def _factors(layer: LoraLayer, adapter: str) -> Factors:
    if groups(layer) > 1:
        raise NotImplementedError("the blocks of B by groups are no matrix")
    a, b = (parameter.flatten(1) if parameter.ndim > 2 else parameter for parameter in parameters(layer, adapter))
    bias = layer.lora_B[adapter].bias if adapter in layer.lora_B else None
    magnitude = layer.lora_magnitude_vector[adapter].weight if adapter in layer.lora_magnitude_vector else None
    return Factors(a, b, bias, magnitude)


def parameters(layer: LoraLayer, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B as PEFT keeps them."""
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def groups(layer: LoraLayer) -> int:
    """The groups of a convolution; PEFT's A reads all channels, and its B has a block for each group."""
    return getattr(layer.get_base_layer(), "groups", 1)


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
    if isinstance(layer, MultiheadAttention):
        plain: nn.Module = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        return plain
    if not layer.merged:
        merge(layer)
    base: nn.Module = layer.get_base_layer()
    return base


def weight(layer: LoraLayer) -> Any:
    """The base layer's weight (d_out, d_in), dequantised; attention has two."""
    base = layer.get_base_layer()
    if isinstance(layer, MultiheadAttention):
        return base.in_proj_weight.detach(), base.out_proj.get_base_layer().weight.detach()
    if _bitsandbytes(base):
        from lora_bench.subjects.bitsandbytes import dequantise

        return dequantise(base)
    if _is_torchao(base):
        from lora_bench.subjects.torchao import dequantise as dequantise_int4

        return dequantise_int4(base)
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
    model = get_peft_model(Box(layer.get_base_layer()), config(first), adapter_name="0")
    for index, (spec, _) in enumerate(others, start=1):
        model.add_adapter(str(index), config(spec))
    pooled = tuner(model)
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


def config(spec: LoraSpec, **changes: Any) -> LoraConfig:
    """PEFT's words for a spec, with others added or changed."""
    words = {
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "use_rslora": spec.rslora,
        "use_dora": spec.dora,
        "lora_bias": spec.lora_bias,
        "target_modules": ["layer"],
    }
    return LoraConfig(**(words | changes))


def tuner(model: PeftModel) -> LoraLayer:
    """The layer of PEFT's in a model of one."""
    return model.get_base_model().layer


def _bitsandbytes(layer: nn.Module) -> str:
    """The name of a layer's class in bitsandbytes, if it is one of those."""
    names = (cls.__name__ for cls in type(layer).__mro__ if cls.__module__.startswith("bitsandbytes."))
    return next((name for name in names if name in ("Linear4bit", "Linear8bitLt")), "")


def _is_torchao(layer: nn.Module) -> bool:
    return type(getattr(layer, "weight", None)).__module__.startswith("torchao.")


@contextmanager
def _quiet_rounding() -> Iterator[None]:
    """PEFT warns at every merge into a 4-bit base that it rounds; here that is measured instead."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(Merge|Unmerge) lora module to [48]-bit linear")
        yield


def _beside_the_base(case: Case) -> bool:
    return case.dilation > 1 or case.padding_mode != "zeros"


CONVOLUTIONS = {
    f"forward.matches_definition@{kind}": Known(
        "lora_A is made without the base's dilation and padding_mode (peft#3697)",
        f"t1 i1 o1 r1 a1 fp64 s0 kernel2 dilation2 {kind}",
        where=_beside_the_base,
    )
    for kind in ("conv1d", "conv2d", "conv3d")
}
POINTWISE = {
    f"{check}@conv3d": Known(
        "a Conv3d with a kernel of 1 cannot be merged (peft#3768, fixed after 0.21.2)",
        "t1 i1 o1 r2 a1 fp64 s0 conv3d",
        where=lambda case: case.kernel == 1,
    )
    for check in ("merge.equals_definition", "merge.and_unload_equals_definition", "lora_bias.merged_equals_definition")
}
UNSCALED_BIAS = {
    f"lora_bias.merged_bias_is_scaled@{kind}": Known(
        "the bias of B is merged without the scaling (peft#3741)",
        f"t1 i5 o1 r1 a2 fp32 s0 bias lora_bias {kind}",
        where=lambda case: case.spec.scaling != 1,
    )
    for kind in ("linear4bit", "linear8bit")
}
LOADED_WHILE_MERGED = Known(
    "unmerging subtracts the factors of now, also where others were merged: the base stays wrong",
    "t1 i1 o1 r1 a1 fp64 s0 n2 ops=merge,load,unmerge",
    where=lambda case: {"merge", "load"} <= set(case.ops),
)

PEFT = Subject(
    "peft",
    wrap,
    load,
    factors=factors,
    merge=merge,
    unmerge=unmerge,
    merge_and_unload=merge_and_unload,
    enable=lambda layer, enabled: layer.enable_adapters(enabled),
    scale=lambda layer, factor: layer.set_scale(ADAPTER, factor),
    weight=weight,
    state=lambda layer: {name: value for name, value in layer.state_dict().items() if "lora_" in name},
    pool=pool,
    plan=plan,
    route=route,
    variants=("lora_bias", "dora"),
    known=ATTENTION | CONVOLUTIONS | POINTWISE | UNSCALED_BIAS | {"lifecycle.any_order": LOADED_WHILE_MERGED},
    layers=(
        "linear",
        "fan_in_fan_out",
        "embedding",
        "conv1d",
        "conv2d",
        "conv3d",
        "multihead_attention",
        "linear4bit",
        "linear8bit",
        "int4",
    ),
)
