"""diffusers, Hugging Face's library of image models: PEFT's layers, driven through the mixin that its models share.

The mixin leaves A and B in the dtype of the base, where PEFT's own default is float32.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from lora_bench.subject import Known, Subject
from lora_bench.subjects import peft, quiet_import
from lora_bench.subjects.one_layer import OneLayer

with quiet_import():
    from diffusers.loaders import PeftAdapterMixin
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lora_bench.case import Case
    from lora_bench.spec import Factors, LoraSpec
    from lora_bench.subject import Layer


class Model(PeftAdapterMixin, OneLayer):  # type: ignore[misc]  # diffusers is not read by mypy
    """A model of one layer with what diffusers' models inherit for adapters."""


def wrap(base: nn.Module, spec: LoraSpec) -> Layer:
    """A model with one adapter."""
    model: Layer = Model(base)
    model.add_adapter(peft.config(spec), peft.ADAPTER)
    return model


def merge_and_unload(model: Layer) -> nn.Module:
    """The base with the adapter fused into it, and the adapter unloaded, as diffusers' guide to fusing does it."""
    model.fuse_lora()
    model.unload_lora()
    base: nn.Module = model.layer
    return base


def enable(model: Layer, enabled: bool) -> None:
    """Switch the adapters on or off; PEFT unmerges at the next forward."""
    if enabled:
        model.enable_lora()
    else:
        model.disable_lora()


def scale(model: Layer, factor: float) -> None:
    """Set the weight of the active adapters."""
    names = model.active_adapters()
    model.set_adapters(names, [factor] * len(names))


def weight(model: Layer) -> Tensor:
    """The base layer's weight, or that of what was unloaded."""
    layer: Layer = model.layer if isinstance(model, Model) else model
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    dense: Tensor = base.weight.detach()
    return dense


def load_state(model: Layer, state: dict[str, Any]) -> None:
    """Read back what `state` gave, as diffusers' training scripts do, which warn of foreign names.

    Raises ValueError for a name that is none of the adapter's.
    """
    loaded = set_peft_model_state_dict(model, state, adapter_name=peft.ADAPTER)
    if loaded.unexpected_keys:
        raise ValueError(f"the adapter has no {', '.join(loaded.unexpected_keys)}")


def add(model: Layer, name: str, spec: LoraSpec, factors: Factors) -> None:
    """A further adapter, which diffusers makes the active one; here that is undone."""
    d_out, d_in = weight(model).flatten(1).shape
    factors.fit(spec.rank, d_in * getattr(model.layer.get_base_layer(), "groups", 1), d_out)
    active = model.active_adapters()
    with warnings.catch_warnings():  # PEFT's, on any second adapter of a model that is not its own
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        model.add_adapter(peft.config(spec), name)
    peft.load(model.layer, factors, name)
    model.set_adapter(active)


def _changed_while_merged(case: Case) -> bool:
    return "merge" in case.ops and bool({"load", "switch", "back"} & set(case.ops))


UNKNOWN_NAMES = "a model's set_adapters takes a name that there is no adapter under (no thread found)"
KNOWN = {
    "forward.matches_definition@conv2d": peft.CONVOLUTIONS["forward.matches_definition@conv2d"],
    "merge.scaled_merges_and_unmerges": Known(
        "unfuse_lora leaves the scale of fuse_lora on the adapter (no thread found)", "t1 i1 o1 r1 a1 fp64 s0"
    ),
    "adapters.unknown_name_is_refused": Known(UNKNOWN_NAMES, "t1 i1 o1 r1 a1 fp64 s0"),
    "adapters.deleted_ones_are_gone": Known(UNKNOWN_NAMES, "t1 i1 o1 r1 a1 fp64 s0 n2"),
    "adapters.partial_merge_keeps_the_others": Known(
        "with one of two active adapters merged the other does not act (peft#3756)", "t1 i1 o1 r1 a1 fp64 s0 n2"
    ),
    "lifecycle.any_order": Known(
        f"{peft.LOADED_WHILE_MERGED.because}; a switch while merged has no effect (no thread found)",
        "t1 i1 o1 r1 a1 fp64 s0 n2 ops=merge,load,unmerge",
        where=_changed_while_merged,
    ),
}

DIFFUSERS = Subject(
    "diffusers",
    wrap,
    load=lambda model, factors: peft.load(model.layer, factors),
    factors=lambda model: peft.factors(model.layer),
    merge=lambda model: model.fuse_lora(),
    unmerge=lambda model: model.unfuse_lora(),
    merge_and_unload=merge_and_unload,
    enable=enable,
    scale=scale,
    merge_scaled=lambda model, factor: model.fuse_lora(lora_scale=factor),
    weight=weight,
    state=lambda model: get_peft_model_state_dict(model, adapter_name=peft.ADAPTER),
    load_state=load_state,
    add=add,
    activate=lambda model, names: model.set_adapters(list(names)),
    delete=lambda model, name: model.delete_adapters(name),
    merge_adapters=lambda model, names: model.fuse_lora(adapter_names=list(names)),
    layers=("linear", "conv2d"),
    variants=("lora_bias", "dora"),
    known=KNOWN,
)
