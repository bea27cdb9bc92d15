"""Putting any layer-level subject into a model: its target linears are found by name, frozen, wrapped and replaced."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lora_bench.reference import Nf4Linear

if TYPE_CHECKING:
    from lora_bench.spec import LoraSpec
    from lora_bench.subject import Layer, Subject

_MARK = "adapted_by"


class AsModule(nn.Module):
    """A layer that is callable but no torch module, as a module; its parameters stay its own."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def layer_kind(module: nn.Module) -> str | None:
    """The kind of linear layer by the words of `Subject.layers`: "linear", "nf4", "linear4bit", or None for others."""
    if isinstance(module, Nf4Linear):
        return "nf4"
    # Known by name, so that a model without bitsandbytes' layers does not import bitsandbytes.
    foreign = [cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("bitsandbytes.")]
    if foreign:
        return "linear4bit" if "Linear4bit" in foreign else None
    return "linear" if isinstance(module, nn.Linear) else None


def find_targets(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Module]:
    """The linear layers that `targets` name, in the model's order.

    A target is a layer's full name or its end, in whole components: "q_proj" and "self_attn.q_proj" find
    "model.layers.0.self_attn.q_proj", but never "xq_proj". A layer that has several names is found under each of them.

    Raises ValueError for a target that finds nothing, naming near misses.
    """
    if isinstance(targets, str) or not targets:
        raise ValueError(f"targets must be a list of at least one layer name, got {targets!r}")
    linears = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name and layer_kind(module) is not None
    }
    for target in targets:
        if not any(_matches(name, target) for name in linears):
            raise ValueError(_no_match(model, target, list(linears)))
    return {name: module for name, module in linears.items() if any(_matches(name, target) for target in targets)}


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place that `name` has in the model; AttributeError where there is no such place."""
    model.get_submodule(name)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def adapt(model: nn.Module, subject: Subject, spec: LoraSpec, targets: Sequence[str]) -> dict[str, Layer]:
    """Freeze the model and replace each linear layer that `targets` name by the subject's layer over it.

    Returns the subject's own layers by name, for its other verbs; a layer with several names is wrapped once. The
    model keeps its mode (train or eval), and where wrapping fails it keeps its layers.

    Raises ValueError for a model that is adapted already, for targets that `find_targets` refuses or that share their
    weight with a layer left out (a merge would change that one too), and for a spec or a kind of layer that the
    subject does not offer.
    """
    for name, module in model.named_modules():
        if hasattr(module, _MARK):
            raise ValueError(f"the model is adapted already, by {getattr(module, _MARK)} at {name}")
    if (reason := subject.supports(spec)) is not None:
        raise ValueError(f"{subject} does not offer {spec}: {reason}")
    found = find_targets(model, targets)
    for name, module in found.items():
        if (kind := layer_kind(module)) not in subject.layers:
            raise ValueError(f"{subject} wraps {', '.join(subject.layers)} layers, and {name} is {kind}")
    _refuse_shared(model, found)
    model.requires_grad_(False)
    wrapped = {base: subject.wrap(base, spec) for base in dict.fromkeys(found.values())}
    placed = {base: layer if isinstance(layer, nn.Module) else AsModule(layer) for base, layer in wrapped.items()}
    for module in placed.values():
        module.train(model.training)
        setattr(module, _MARK, subject.name)
    for name, base in found.items():
        replace(model, name, placed[base])
    return {name: wrapped[base] for name, base in found.items()}


def _matches(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _no_match(model: nn.Module, target: str, linears: list[str]) -> str:
    for name, module in model.named_modules():
        if name and _matches(name, target):
            return f"target {target!r} is no linear layer: {name} is of type {type(module).__name__}"
    parts = target.count(".") + 1
    ends = sorted({".".join(name.split(".")[-parts:]) for name in linears})
    near = difflib.get_close_matches(target, ends, n=3)
    known = f"near misses: {', '.join(near)}" if near else f"linear layers end in {', '.join(ends) or 'nothing'}"
    return f"target {target!r} matches no linear layer of the model; {known}"


def _refuse_shared(model: nn.Module, found: dict[str, nn.Module]) -> None:
    """Raise ValueError where a weight of the layers found is also that of a place left out, as in a tied head."""
    owners = defaultdict(set)
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        owners[tensor].add(name.rpartition(".")[0])
    for name, module in found.items():
        for tensor in (*module.parameters(), *module.buffers()):
            if others := owners[tensor] - found.keys():
                raise ValueError(f"{name} shares its weight with {min(others)}, no target: a merge would change both")
