"""How a bug is planted: the reference with one thing changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_bench.reference import REFERENCE, wrap
from lora_bench.reference.kinds import LoraConv

if TYPE_CHECKING:
    from torch import Tensor

    from lora_bench.reference import LoraLayer
    from lora_bench.spec import LoraSpec
    from lora_bench.subject import Layer, Subject


@dataclass(frozen=True)
class Specimen:
    """An implementation with one planted bug, and the checks that must find it, each on every kind of base it is about.

    `seen` is the thread in which the bug, or its like, was reported of a program that had shipped.
    """

    name: str
    subject: Subject
    kills: tuple[str, ...]
    seen: str = ""

    def __str__(self) -> str:
        return self.name


def specimens(check: str, **bugs: Subject | tuple[Subject, str]) -> tuple[Specimen, ...]:
    """Specimens that one check must find, by name (an underscore is a space), each with its thread if it has one."""
    planted = {name.replace("_", " "): bug if isinstance(bug, tuple) else (bug, "") for name, bug in bugs.items()}
    return tuple(Specimen(f"{check}: {name}", subject, (check,), seen) for name, (subject, seen) in planted.items())


def bug(**verbs: Any) -> Subject:
    """The reference with other verbs or other declarations."""
    return replace(REFERENCE, name="acme", **verbs)


def specified(**changes: Callable[[LoraSpec], Any]) -> Subject:
    """The reference, taking a spec for another one."""

    def mistaken(base: Layer, spec: LoraSpec) -> LoraLayer:
        return wrap(base, replace(spec, **{name: change(spec) for name, change in changes.items()}))

    return bug(wrap=mistaken)


def wrapped(change: Callable[[Any], object], **verbs: Any) -> Subject:
    """The reference with something done to each layer once it is wrapped."""

    def changed(base: Layer, spec: LoraSpec) -> LoraLayer:
        layer = wrap(base, spec)
        change(layer)
        return layer

    return bug(wrap=changed, **verbs)


def altered(**members: Any) -> Subject:
    """The reference, each layer's class with other members."""
    return wrapped(lambda layer: alter(layer, **members))


def alter(layer: LoraLayer, **members: Any) -> None:
    """Give a layer's class other members; theirs is what `original` gives."""
    layer.__class__ = type("Acme", (type(layer),), members)
    layer.settle()


def original(layer: Any) -> Any:
    """The reference's class that `altered` has altered, with its own members."""
    return type(layer).__mro__[1]


def computing(forward: Callable[[Any, Tensor], Any]) -> Subject:
    """The reference with another forward, of the layer and x."""
    return altered(forward=forward)


def correct(layer: Any, x: Tensor) -> Tensor:
    """The reference's output."""
    y: Tensor = original(layer).forward(layer, x)
    return y


def delta(layer: Any, x: Tensor) -> Tensor:
    """What the own adapter adds to the output."""
    y: Tensor = layer.delta(x, layer)
    return y


def output(layer: Any, y: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """An output with a change made to it, its features last."""
    return change(y.movedim(1, -1)).movedim(-1, 1) if isinstance(layer, LoraConv) else change(y)
