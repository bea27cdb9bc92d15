"""LyCORIS, the library of the kohya family (Yeh et al. 2024, arXiv 2309.14859), with its algorithm "lora".

By default every forward adds s B A to the weight first, and what that changes in it is multiplied by x; with
`bypass_mode` A and B are run beside the base, as other libraries do. Each is a subject. Over a 16-bit base A and B
stay in float32, as LyCORIS makes them.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_bench.spec import Factors
from lora_bench.subject import Subject
from lora_bench.subjects import quiet_import
from lora_bench.subjects.lycoris_known import WITH_BYPASS, WITHOUT_BYPASS
from lora_bench.subjects.one_layer import OneLayer

with quiet_import():
    from lycoris import create_lycoris

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lora_bench.spec import LoraSpec
    from lora_bench.subject import Known, Layer

ADAPTER = "default"

# It says on the standard output what it makes, for every layer at length.
logging.getLogger("LyCORIS").setLevel(logging.WARNING)


class Adapted(nn.Module):
    """A model and its LyCORIS networks, one for each adapter, which are no part of the model."""

    def __init__(self, base: nn.Module, *, bypass: bool) -> None:
        super().__init__()
        self.model: Layer = OneLayer(base.requires_grad_(False))  # what LyCORIS leaves to whoever makes the optimiser
        self.networks: Layer = nn.ModuleDict()
        self.bypass = bypass
        self.enabled = True
        self.active = [ADAPTER]
        self.merged: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x)
        return y

    def create(self, name: str, spec: LoraSpec) -> None:
        """A further network, which does not act before `attach`.

        Raises ValueError where LyCORIS makes none, of which it warns if it is let.
        """
        network = create_lycoris(
            self.model,
            1.0,
            linear_dim=spec.rank,
            linear_alpha=spec.alpha,
            algo="lora",
            dropout=spec.dropout,
            dora_wd=spec.dora,
            bypass_mode=self.bypass,
            warn_on_unmatched=False,  # of the kinds of layer that it looks for the model has one
        )
        if not network.loras:
            raise ValueError(f"LyCORIS adapts no layer with rank {spec.rank}")
        network.apply_to()  # until then the network has no parameters
        weight = self.model.layer.weight
        self.networks[name] = network.to(weight.device, torch.promote_types(weight.dtype, torch.float32))

    def attach(self) -> None:
        """Let those networks act, and train, that are active and not merged, and no others."""
        for name, network in self.networks.items():
            network.requires_grad_(name in self.active)
            network.restore()
        for name in self.active:
            if self.enabled and name not in self.merged:
                self.networks[name].apply_to()


def wrap(base: nn.Module, spec: LoraSpec, *, bypass: bool) -> Adapted:
    """A model of one layer with one network applied to it.

    Raises NotImplementedError for a convolution with groups, whose A has groups here as well.
    """
    if getattr(base, "groups", 1) != 1:
        raise NotImplementedError("LyCORIS gives A the groups of the convolution, and B none")
    layer = Adapted(base, bypass=bypass)
    layer.create(ADAPTER, spec)
    layer.attach()
    return layer


def live_factors(layer: Layer, adapter: str = ADAPTER) -> Factors:
    """The parameters; those of a convolution are kernels, of which these are views."""
    (module,) = layer.networks[adapter].loras
    magnitude = module.dora_scale.flatten() if module.wd else None
    return Factors(module.lora_down.weight.flatten(1), module.lora_up.weight.flatten(1), magnitude=magnitude)


def load(layer: Layer, factors: Factors, adapter: str = ADAPTER) -> None:
    """Copy the factors in, as `load_weights` does; while merged LyCORIS takes no notice of them."""
    live = live_factors(layer, adapter)
    factors.fit(live.rank, live.d_in, live.d_out)
    with torch.no_grad():
        live.a.copy_(factors.a)
        live.b.copy_(factors.b)
        if factors.magnitude is not None and live.magnitude is not None:
            live.magnitude.copy_(factors.magnitude)


def merge(layer: Layer) -> None:
    """Write every active adapter into the weight, as it acts now."""
    merge_adapters(layer, layer.active)


def merge_adapters(layer: Layer, names: Sequence[str], factor: float | None = None) -> None:
    """Write some of the active adapters into the weight, as they act now or times another factor."""
    for name in [name for name in names if name not in layer.merged]:
        network = layer.networks[name]
        network.onfly_merge(network.multiplier if factor is None else factor)
        layer.merged.append(name)
    layer.attach()


def unmerge(layer: Layer) -> None:
    """Put back the weight that LyCORIS has kept."""
    while layer.merged:
        layer.networks[layer.merged.pop()].onfly_restore()
    layer.attach()


def merge_and_unload(layer: Layer) -> nn.Module:
    """The base with the active adapters in its weight, by the other of LyCORIS' two merges, which keeps nothing."""
    for network in layer.networks.values():
        network.restore()
    for name in layer.active:
        if name not in layer.merged:
            layer.networks[name].merge_to(layer.networks[name].multiplier)
    base: nn.Module = layer.model.layer
    return base


def enable(layer: Layer, enabled: bool) -> None:
    """Switch the adapters on or off; off is without what was merged."""
    if not enabled:
        unmerge(layer)
    layer.enabled = enabled
    layer.attach()


def scale(layer: Layer, factor: float) -> None:
    """Set the multiplier of the active adapters."""
    for name in layer.active:
        layer.networks[name].set_multiplier(factor)


def weight(layer: Layer) -> Tensor:
    """The weight of the base."""
    base = layer.model.layer if isinstance(layer, Adapted) else layer
    dense: Tensor = base.weight.detach()
    return dense


def state(layer: Layer) -> dict[str, Tensor]:
    """What LyCORIS saves but for alpha, which it keeps beside the factors as a tensor without dimensions."""
    return {name: value for name, value in layer.networks[ADAPTER].state_dict().items() if value.ndim}


def load_state(layer: Layer, state: dict[str, Any]) -> None:
    """Read it back, and refuse foreign names, which `load_weights` reports."""
    network = layer.networks[ADAPTER]
    network.load_state_dict(network.state_dict() | state)


def add(layer: Layer, name: str, spec: LoraSpec, factors: Factors) -> None:
    """A further network over the same model."""
    d_out, d_in = layer.model.layer.weight.flatten(1).shape
    factors.fit(spec.rank, d_in, d_out)
    layer.create(name, spec)
    load(layer, factors, name)
    layer.attach()


def activate(layer: Layer, names: Sequence[str]) -> None:
    """Apply these networks to the model, one upon the other, and take the others off.

    Raises KeyError for a name that there is no network of.
    """
    for name in names:
        layer.networks[name]
    layer.active = list(names)
    layer.attach()


def delete(layer: Layer, name: str) -> None:
    """Forget a network that is not active."""
    del layer.networks[name]


def supports(spec: LoraSpec) -> str | None:
    """Why LyCORIS does not do a spec."""
    if spec.rslora:
        return "create_lycoris has no rsLoRA: it does not hand rs_lora on"
    if spec.alpha == 0:
        return "LyCORIS takes an alpha of 0 for the rank, so for a scaling of 1"
    if spec.dora and spec.dropout:
        return "LyCORIS has no dropout with DoRA, as it warns"
    return None


def subject(name: str, *, bypass: bool, known: Mapping[str, Known]) -> Subject:
    """LyCORIS as a subject, in one of its two modes."""
    return Subject(
        name,
        partial(wrap, bypass=bypass),
        load,
        factors=live_factors,
        merge=merge,
        unmerge=unmerge,
        merge_and_unload=merge_and_unload,
        enable=enable,
        scale=scale,
        merge_scaled=lambda layer, factor: merge_adapters(layer, layer.active, factor),
        weight=weight,
        state=state,
        load_state=load_state,
        add=add,
        activate=activate,
        delete=delete,
        merge_adapters=merge_adapters,
        supports=supports,
        layers=("linear", "conv1d", "conv2d", "conv3d"),
        variants=("dora",),
        known=known,
    )


LYCORIS = subject("lycoris", bypass=False, known=WITHOUT_BYPASS)
BYPASS = subject("lycoris-bypass", bypass=True, known=WITH_BYPASS)
