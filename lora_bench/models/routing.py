"""Mixed batches in a model: one statement of who goes where, shared by every adapted layer of a forward."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_bench.models.inject import replace

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from lora_bench.spec import Factors, LoraSpec
    from lora_bench.subject import Layer, Subject


class Router:
    """Which adapter each row of the present forward goes through; one for all routed layers of a model."""

    def __init__(self, subject: Subject, device: torch.device) -> None:
        self.subject = subject
        self.device = device
        self.plan: Any = None

    @contextmanager
    def ids(self, ids: Tensor) -> Iterator[None]:
        """Forwards inside send row i through adapter ids[i], -1 for none; ids is (n,) int64 on the CPU.

        The subject's plan is made once, on entry; leaving restores what was set before, also by an exception.
        """
        before = self.plan
        self.plan = ids if self.subject.plan is None else self.subject.plan(ids, self.device)
        try:
            yield
        finally:
            self.plan = before


class Routed(nn.Module):
    """A subject's layer whose rows go where the shared router says; RuntimeError for a forward outside `Router.ids`."""

    def __init__(self, layer: Layer, pool: Any, router: Router) -> None:
        super().__init__()
        self.layer = layer
        self.pool = pool
        self.router = router
        self.adapted_by = router.subject.name

    def forward(self, x: Tensor) -> Tensor:
        if self.router.plan is None:
            raise RuntimeError("a routed layer needs adapter ids: run the forward inside `with router.ids(ids):`")
        y: Tensor = self.router.subject.route(self.layer, self.pool, x, self.router.plan)  # type: ignore[misc]
        return y


def route_model(
    model: nn.Module,
    subject: Subject,
    layers: Mapping[str, Layer],
    adapters_per_layer: Mapping[str, Sequence[tuple[LoraSpec, Factors]]],
) -> Router:
    """Make each layer that `adapt` returned choose among its own adapters, and return the one router of them all.

    The pools are made before any layer is replaced.

    Raises ValueError for a subject without `pool` and `route`, and for layers and adapters of different names.
    """
    if not subject.offers("pool", "route"):
        raise ValueError(f"{subject} offers no mixed batches: it needs the verbs pool and route")
    if layers.keys() != adapters_per_layer.keys():
        names = ", ".join(sorted(layers.keys() ^ adapters_per_layer.keys()))
        raise ValueError(f"every adapted layer needs its adapters and no other does; they differ in {names}")
    device = getattr(model, "device", None) or next(model.parameters()).device
    router = Router(subject, device)
    pools = {name: subject.pool(layer, adapters_per_layer[name]) for name, layer in layers.items()}  # type: ignore[misc]
    for name, layer in layers.items():
        replace(model, name, Routed(layer, pools[name], router))
    return router
