"""Bugs of adapted models: layers that are missed, and what trains in them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import nn

from lora_bench.conformance.zoo.planting import bug, specimens
from lora_bench.reference.model import adapt
from lora_bench.targets import ALL_LINEAR

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lora_bench.spec import LoraSpec
    from lora_bench.subject import Subject


def naming(find: Callable[[list[str], Sequence[str] | str], list[str]]) -> Subject:
    """The reference, finding the layers by other rules."""

    def other(model: nn.Module, spec: LoraSpec, targets: Sequence[str] | str) -> object:
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        found = find(names, targets)
        if not found:
            raise ValueError(f"{targets} match no layer")
        return adapt(model, spec, found)

    return bug(adapt=other)


def by_list(names: list[str], targets: Sequence[str] | str, fits: Callable[[str, str], bool]) -> list[str]:
    """The names that fit a word, or a pattern as it should."""
    if isinstance(targets, str):
        return names if targets == ALL_LINEAR else [name for name in names if re.fullmatch(targets, name)]
    return [name for name in names if any(fits(name, word) for word in targets)]


def end(name: str, word: str) -> bool:
    """Whether the word is the end of the name, in whole components."""
    return f".{name}".endswith(f".{word}")


def by_pattern(names: list[str], targets: Sequence[str] | str) -> list[str]:
    if isinstance(targets, str) and targets != ALL_LINEAR:
        return [name for name in names if re.match(targets, name)]
    return by_list(names, targets, end)


def silent(model: nn.Module, spec: LoraSpec, targets: Sequence[str] | str) -> nn.Module:
    """Adapts nothing where nothing matches."""
    try:
        return adapt(model, spec, targets)
    except ValueError:
        return model.requires_grad_(False)


def adapted(change: Callable[[Any], object]) -> Subject:
    """The reference with something done to each model that it adapts."""

    def changed(model: nn.Module, spec: LoraSpec, targets: Sequence[str] | str) -> object:
        made = adapt(model, spec, targets)
        change(made)
        return made

    return bug(adapt=changed)


def norm_trains(model: Any) -> None:
    model.model.norm.requires_grad_(True)


def not_zero(model: Any) -> None:
    for layer in model.layers.values():
        nn.init.ones_(layer.lora_B)


def a_frozen(model: Any) -> None:
    (layer, *_) = model.layers.values()
    hidden = layer.hidden
    layer.hidden = lambda x, adapter: hidden(x, adapter).detach()


SPECIMENS = (
    *specimens(
        "model.names_find_their_layers",
        any_end_will_do=naming(lambda names, targets: by_list(names, targets, str.endswith)),
        the_first_name_alone=naming(lambda names, targets: by_list(names, targets[:1], end)),
        the_first_layer_alone=(
            naming(lambda names, targets: by_list(names, targets, end)[:1]),
            "torchforge#592",
        ),
    ),
    *specimens("model.a_pattern_is_of_whole_names", the_beginning_will_do=naming(by_pattern)),
    *specimens(
        "model.all_linear_is_every_linear",
        one_is_forgotten=naming(lambda names, targets: by_list(names, targets, end)[1:]),
    ),
    *specimens("model.no_match_is_refused", nothing_is_adapted=bug(adapt=silent)),
    *specimens(
        "model.only_adapters_train", the_norm_trains=adapted(norm_trains), it_starts_elsewhere=adapted(not_zero)
    ),
    *specimens("model.every_adapter_learns", one_is_detached=(adapted(a_frozen), "torchforge#592")),
)
