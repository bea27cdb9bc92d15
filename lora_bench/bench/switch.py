"""Switching: another adapter takes the place of the one that a model serves, in every layer."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, cast

from lora_bench.bench.clock import moment, seconds_between
from lora_bench.bench.sampling import MOST_ROUNDS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from lora_bench.bench.clock import Moment
    from lora_bench.models.routing import Routed
    from lora_bench.spec import Factors, LoraSpec
    from lora_bench.subject import Layer, Subject

Adapters = dict[str, list[tuple["LoraSpec", "Factors"]]]
PARTS = {"separate": ("load",), "merged": ("evict", "load", "merge"), "batched": ("evict", "pool")}
"""What a switch does, by the set-up, each in all layers before the next."""


class Switch:
    """Two sets of adapters that change places each time it is called; the first is the one that is served now.

    separate: the other's factors are copied into the layers (load), over the one's. merged: the one is unmerged
    (evict), the other loaded and merged. batched: the one's pool is let go of (evict), and the other's made ready.

    It notes the moments between the parts, which costs a reading of the clock or an event each; what they took is only
    worked out when it is asked for.
    """

    def __init__(
        self,
        setup: str,
        subject: Subject,
        model: PreTrainedModel,
        layers: Mapping[str, Layer],
        sets: tuple[Adapters, Adapters],
    ) -> None:
        self.parts, self.subject, self.model, self.layers = PARTS[setup], subject, model, layers
        self.device = str(model.device)
        self.served, self.other = sets
        self._evict = self._drop if setup == "batched" else self._unmerge
        self._moments: deque[list[Moment]] = deque(maxlen=MOST_ROUNDS)

    def __call__(self) -> None:
        self.served, self.other = self.other, self.served
        moments = [moment(self.device)]
        for part in self.parts:
            do: Any = getattr(self, f"_{part}")
            for name, layer in self.layers.items():
                do(name, layer, self.served[name])
            moments.append(moment(self.device))
        self._moments.append(moments)

    def seconds(self, calls: int) -> dict[str, list[float]]:
        """What each part took in the last so many calls, in their order.

        Raises ValueError where there were fewer, or more than are kept.
        """
        if not 0 <= calls <= len(self._moments):
            raise ValueError(f"{len(self._moments)} switches are kept, asked for {calls}")
        last = list(self._moments)[len(self._moments) - calls :]
        return {
            part: [seconds_between(moments[number], moments[number + 1]) for moments in last]
            for number, part in enumerate(self.parts)
        }

    def _load(self, _name: str, layer: Layer, adapters: list[tuple[LoraSpec, Factors]]) -> None:
        self.subject.load(layer, adapters[0][1])

    def _unmerge(self, _name: str, layer: Layer, _adapters: object) -> None:
        cast("Any", self.subject).unmerge(layer)  # who is asked to switch a merged model offers it

    def _merge(self, _name: str, layer: Layer, _adapters: object) -> None:
        cast("Any", self.subject).merge(layer)

    def _drop(self, name: str, _layer: Layer, _adapters: object) -> None:
        cast("Routed", self.model.get_submodule(name)).pool = None

    def _pool(self, name: str, layer: Layer, adapters: list[tuple[LoraSpec, Factors]]) -> None:
        routed = cast("Routed", self.model.get_submodule(name))
        routed.pool = cast("Any", self.subject).pool(layer, adapters)
