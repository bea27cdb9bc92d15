"""Switching: another adapter takes the place of the one that a model serves, in every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from lora_bench.models.routing import Routed
    from lora_bench.spec import Factors, LoraSpec
    from lora_bench.subject import Layer, Subject

Adapters = dict[str, list[tuple["LoraSpec", "Factors"]]]


class Switch:
    """Two sets of adapters that change places each time it is called; the first is the one that is served now.

    separate: the other's factors are copied into the layers. merged: the one is unmerged, the other copied in and
    merged. batched: a whole pool is made ready, and the one before it let go of.
    """

    def __init__(
        self,
        setup: str,
        subject: Subject,
        model: nn.Module,
        layers: Mapping[str, Layer],
        sets: tuple[Adapters, Adapters],
    ) -> None:
        self.setup, self.subject, self.model, self.layers = setup, subject, model, layers
        self.served, self.other = sets

    def __call__(self) -> None:
        self.served, self.other = self.other, self.served
        put: Any = {"merged": self._merge, "batched": self._pool}.get(self.setup, self._load)
        for name, layer in self.layers.items():
            put(name, layer, self.served[name])

    def _load(self, _name: str, layer: Layer, adapters: list[tuple[LoraSpec, Factors]]) -> None:
        self.subject.load(layer, adapters[0][1])

    def _merge(self, name: str, layer: Layer, adapters: list[tuple[LoraSpec, Factors]]) -> None:
        verbs = cast("Any", self.subject)  # who is asked offers both
        verbs.unmerge(layer)
        self._load(name, layer, adapters)
        verbs.merge(layer)

    def _pool(self, name: str, layer: Layer, adapters: list[tuple[LoraSpec, Factors]]) -> None:
        routed = cast("Routed", self.model.get_submodule(name))
        routed.pool = cast("Any", self.subject).pool(layer, adapters)
