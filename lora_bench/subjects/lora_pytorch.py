"""lora-pytorch (github.com/fkodom/lora-pytorch): LoRA beside any module, without alpha and without dropout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lora_pytorch import LoRA
from torch import Tensor, nn

from lora_bench.spec import Factors
from lora_bench.subject import Known, Subject
from lora_bench.subjects.convolutions import convolutions, padded_otherwise

if TYPE_CHECKING:
    from lora_bench.spec import LoraSpec
    from lora_bench.subject import Layer


def wrap(base: nn.Module, spec: LoraSpec) -> LoRA:
    """lora-pytorch does not freeze the base: it runs it without gradients and leaves it out of `parameters()`.

    Raises NotImplementedError for a convolution with groups, whose A has groups here as well.
    """
    if getattr(base, "groups", 1) != 1:
        raise NotImplementedError("lora-pytorch gives A the groups of the convolution, and B none")
    return LoRA.from_module(base.requires_grad_(False), rank=spec.rank)


def load(layer: LoRA, factors: Factors) -> None:
    """Copy the factors in, whose transposes lora-pytorch holds of a linear layer and of an embedding."""
    live = live_factors(layer)
    factors.fit(live.rank, live.d_in, live.d_out)
    with torch.no_grad():
        live.a.copy_(factors.a)
        live.b.copy_(factors.b)


def live_factors(layer: LoRA) -> Factors:
    """Views of the parameters: those of a convolution are kernels, A's of the base's size and B's of size 1."""
    adapter = layer.lora_module
    if hasattr(adapter, "in_conv"):
        return Factors(adapter.in_conv.weight.flatten(1), adapter.out_conv.weight.flatten(1))
    return Factors(adapter.in_proj.T, adapter.out_proj.T)


def weight(layer: Layer) -> Tensor:
    """The weight of the base, or of what a merge has returned; `LoRA.weight` is the sum of it and the adapter's."""
    base = layer.module if isinstance(layer, LoRA) else layer
    dense: Tensor = base.weight.detach()
    return dense


def enable(layer: LoRA, enabled: bool) -> None:
    """Switch the adapter on or off."""
    if enabled:
        layer.enable_lora()
    else:
        layer.disable_lora()


def supports(spec: LoraSpec) -> str | None:
    """Why lora-pytorch does not do a spec: it adds B A x as it is, and `LoRA.from_module` takes a rank alone."""
    if spec.scaling != 1:
        return f"lora-pytorch has no alpha, its scaling is 1 and not {spec.scaling:g}"
    return "lora-pytorch has no dropout" if spec.dropout else None


NO_GRADIENT = "the base runs under no_grad, so the input gets no gradient through W (no thread found)"
KNOWN = {
    **convolutions(
        "forward.matches_definition",
        "in_conv is made without the base's padding_mode (no thread found)",
        "padding1 {} reflect",
        padded_otherwise,
    ),
    **convolutions("training.gradients_match_formulas", NO_GRADIENT),
    **{
        check: Known(NO_GRADIENT, "t1 i1 o1 r1 a1 fp64 s0")
        for check in (
            "training.gradients_match_formulas",
            "training.gradcheck",
            "training.checkpointing_changes_nothing",
            "state.trains_after_loading",
        )
    },
}

LORA_PYTORCH = Subject(
    "lora-pytorch",
    wrap,
    load,
    factors=live_factors,
    merge=lambda layer: layer.merge_lora(),  # a merged copy: there is nothing to unmerge
    merge_and_unload=lambda layer: layer.merge_lora(inplace=True),
    enable=enable,
    weight=weight,
    state=lambda layer: layer.lora_module.state_dict(),
    load_state=lambda layer, state: layer.lora_module.load_state_dict(state),
    supports=supports,
    layers=("linear", "embedding", "conv1d", "conv2d", "conv3d"),
    known=KNOWN,
)
