"""`LoraLayer`: a frozen layer of any kind and its adapters, which train, merge and unmerge."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_bench.reference.adapter import Adapter, held
from lora_bench.reference.merging import Merging
from lora_bench.spec import Factors

if TYPE_CHECKING:
    from lora_bench.spec import LoraSpec

OWN = "default"
"""The name of the adapter that a layer is made with."""


class LoraLayer(Merging, Adapter):
    """y = base_layer(x) + s (B A dropout(x) + lora_bias) over an existing layer, which is frozen and kept.

    lora_A is random and lora_B zero, so that the layer starts as its base (Hu et al. 2021, arXiv 2106.09685, section
    4.1). All take their dtype and device from the base.

    Adapters act while they are active and the layer is enabled, beside the base's weight or merged into it, and what
    they add adds up. While anything is merged, loading, scaling, switching, training and saving the whole layer are
    refused, as the merged weight would not follow; `unmerge` restores the base bit for bit, and `enable(False)`
    unmerges. What is refused changes nothing. Further adapters come from `lora_bench.reference.several`.
    """

    base_layer: Any
    _unmerged_weight: Tensor | None
    _unmerged_bias: Tensor | None

    def __init__(self, base_layer: nn.Module, spec: LoraSpec) -> None:
        super().__init__(spec, *self.fresh(base_layer, spec.rank))
        self.base_layer = base_layer.requires_grad_(False)
        self.further = nn.ModuleDict()
        self.enabled = True
        self.factor = 1.0
        self.active: tuple[str, ...] = (OWN,)
        self.merged_at: dict[str, float] = {}  # what the base's weight holds, and the scaling of each
        self.register_buffer("_unmerged_weight", None, persistent=False)
        self.register_buffer("_unmerged_bias", None, persistent=False)
        self.settle()

    # What A, B and B A are differs between the kinds of layer

    @staticmethod
    def fresh(base_layer: Any, rank: int) -> tuple[Tensor, Tensor]:
        """A new lora_A and lora_B; TypeError for a base of another kind."""
        raise NotImplementedError

    def hidden(self, x: Tensor, adapter: Adapter) -> Tensor:
        """A dropout(x)."""
        raise NotImplementedError

    def outward(self, hidden: Tensor, adapter: Adapter, bias: Tensor | None) -> Tensor:
        """B hidden + bias."""
        raise NotImplementedError

    def plus(self, weight: Tensor, factors: Factors, scaling: float) -> Tensor:
        """W + s B A, in the shape that the base keeps W in."""
        raise NotImplementedError

    def shaped(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """The matrices a and b in the shapes of lora_A and lora_B."""
        return factors.a, factors.b

    def matrices(self, adapter: Adapter) -> Factors:
        """An adapter's parameters as matrices that share their storage."""
        return Factors(adapter.lora_A, adapter.lora_B, adapter.lora_bias)

    def base_weight(self) -> Tensor:
        """The weight that the base multiplies by now, in the shape that it keeps it in."""
        weight: Tensor = self.base_layer.weight.detach()
        return weight

    def plain(self, weight: nn.Parameter) -> Any:
        """A layer as the base is, with this weight."""
        return copy.deepcopy(self.base_layer, {id(self.base_layer.weight): weight})

    # The output

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        if self._own_acts:
            y = y + self.delta(x, self)
        for adapter in self._others_acting:
            y = y + self.delta(x, adapter)
        return y

    def delta(self, x: Tensor, adapter: Adapter) -> Tensor:
        """What an adapter adds to the output."""
        scaling, bias = adapter.scaling, adapter.lora_bias
        return self.outward(self.hidden(x, adapter) * scaling, adapter, None if bias is None else bias * scaling)

    # The adapters

    @property
    def factors(self) -> Factors:
        """The own adapter's live parameters."""
        return self.matrices(self)

    def load(self, factors: Factors) -> None:
        """Copy `factors` into the own adapter.

        Raises ValueError where they do not fit or their values overflow the dtype, RuntimeError while merged.
        """
        kept = self.held(factors, self.spec)
        self.refuse_merged("loading other factors: the merged weight holds the old ones")
        self.fill(*self.shaped(kept), kept.bias)

    def held(self, factors: Factors, spec: LoraSpec) -> Factors:
        """`factors` in the layer's dtype; raises what `lora_bench.reference.adapter.held` does."""
        return held(factors, spec, self.lora_A.shape[1:].numel(), len(self.lora_B), self.lora_A.dtype)

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """As that of an adapter; RuntimeError while merged."""
        self.refuse_merged("loading another state: the merged weight holds the old one")
        super().load_adapter_state(state)

    def adapter(self, name: str) -> Adapter:
        """The adapter of that name, the layer being its own; ValueError where there is none."""
        if name == OWN:
            return self
        if name not in self.further:
            raise ValueError(f"no adapter is called {name!r}, there are {', '.join((OWN, *self.further))}")
        found = self.further[name]
        assert isinstance(found, Adapter)
        return found

    def enable(self, enabled: bool) -> None:
        """Let the active adapters act, or none, which gives the base's own output, also after a merge."""
        if not enabled:
            self.unmerge()
        self.enabled = enabled
        self.settle()

    def scale(self, factor: float) -> None:
        """Multiply what each adapter adds by `factor` from now on; 1 gives its own back.

        Raises ValueError for a factor that is not finite, RuntimeError while merged.
        """
        must_be_finite(factor)
        self.refuse_merged("scaling: the merged weight holds the adapter at its present scale")
        self.factor = factor
        for adapter in (self, *map(self.adapter, self.further)):
            adapter.scaling = factor * adapter.spec.scaling

    def settle(self) -> None:
        """Work out what acts beside the base's weight, so that `forward` need not."""
        beside = [name for name in self.active if self.enabled and name not in self.merged_at]
        self._own_acts = OWN in beside
        self._others_acting = tuple(self.adapter(name) for name in beside if name != OWN)

    # The weight

    @property
    def merged(self) -> bool:
        return bool(self.merged_at)

    @torch.no_grad()
    def merge(self, names: Sequence[str] | None = None, factor: float = 1.0) -> None:
        """Write `factor` times s B A of active adapters, of all or of `names`, into the base; the rest go on beside it.

        W is kept for an exact `unmerge`. Merging an adapter twice is once.

        Raises RuntimeError while the layer is off and for an adapter that is merged at another scale, ValueError for
        one that is not active and for a factor that is not finite, NotImplementedError for an adapter with a bias on a
        base without one: a new parameter would change the base for whoever else holds it.
        """
        self.refuse_disabled()
        must_be_finite(factor)
        names = self.active if names is None else names
        if idle := [name for name in names if name not in self.active]:
            raise ValueError(
                f"only active adapters are merged ({', '.join(self.active) or 'none is'}), got {idle[0]!r}"
            )
        together = self.merged_at | {name: factor * self.adapter(name).scaling for name in names}
        scalings = {name: together[name] for name in self.active if name in together}  # summed in the same order always
        if any(scalings[name] != scaling for name, scaling in self.merged_at.items()):
            raise RuntimeError("unmerge before merging at another scale")
        if scalings == self.merged_at:
            return
        weight, bias = self.merged_weight(scalings), self.merged_bias(scalings)
        base_bias = self._base_bias()
        if bias is not None and base_bias is None:
            raise NotImplementedError("the base has no bias to merge the adapter's into; merge_and_unload makes one")
        if not self.merged:
            self._unmerged_weight = self.base_layer.weight.detach().clone()
            self._unmerged_bias = None if base_bias is None else base_bias.detach().clone()
        self._write(weight, bias)
        self.merged_at = scalings
        self.settle()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the base's weight and bias, bit for bit; without a merge nothing happens."""
        if self._unmerged_weight is not None:
            self._write(self._unmerged_weight, self._unmerged_bias)
            self._unmerged_weight = self._unmerged_bias = None
            self.merged_at = {}
            self.settle()

    def merge_and_unload(self) -> nn.Module:
        """A plain layer that computes what this one does, for deployment; shares no storage with this one.

        Raises RuntimeError while the layer is off.
        """
        self.refuse_disabled()
        layer = self.plain(nn.Parameter(self.merged_weight(), requires_grad=False))
        bias = self.merged_bias()
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        return layer

    @torch.no_grad()
    def merged_weight(self, scalings: Mapping[str, float] | None = None) -> Tensor:
        """W + s B A of these adapters, by default of all that act, summed in float32 or wider and rounded once."""
        weight = self.base_weight() if self._unmerged_weight is None else self._unmerged_weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        total = weight.to(wide)
        for name, scaling in (self._scalings() if scalings is None else scalings).items():
            total = self.plus(total, self.matrices(self.adapter(name)).map(lambda own: own.to(wide)), scaling)
        return weight.clone() if total is weight else total.to(weight.dtype)

    @torch.no_grad()
    def merged_bias(self, scalings: Mapping[str, float] | None = None) -> Tensor | None:
        """The base's bias + s lora_bias, as the weight is made; None where there is neither."""
        bias = self._base_bias() if self._unmerged_bias is None else self._unmerged_bias
        several = (self._scalings() if scalings is None else scalings).items()
        own = [(beta, scaling) for name, scaling in several if (beta := self.adapter(name).lora_bias) is not None]
        if bias is None and not own:
            return None
        bias = torch.zeros_like(own[0][0]) if bias is None else bias
        total = bias.to(torch.promote_types(bias.dtype, torch.float32), copy=True)
        for beta, scaling in own:
            total.add_(beta, alpha=scaling)
        return total.to(bias.dtype)

    def _scalings(self) -> dict[str, float]:
        """What acts, merged or beside the weight, and with which scaling."""
        return {name: self.merged_at.get(name, self.adapter(name).scaling) for name in self.active}

    def _base_bias(self) -> Tensor | None:
        return getattr(self.base_layer, "bias", None)

    def _write(self, weight: Tensor, bias: Tensor | None) -> None:
        self.base_layer.weight.copy_(weight)
        if bias is not None:
            self.base_layer.bias.copy_(bias)


def must_be_finite(factor: float) -> None:
    """Raise ValueError for a factor that no adapter can be multiplied by."""
    if not math.isfinite(factor):
        raise ValueError(f"the factor must be finite, got {factor}")
