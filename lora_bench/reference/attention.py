"""LoRA on nn.MultiheadAttention: the base's own forward, called with W + s B A for both of its weights."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_bench.reference.adapter import Adapter, held
from lora_bench.reference.layer import uniform
from lora_bench.reference.merging import Merging
from lora_bench.spec import Factors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_bench.spec import LoraSpec


class LoraAttention(Merging):
    """An nn.MultiheadAttention, frozen and kept, with an adapter on in_proj (3 d, d) and one on out_proj (d, d).

    It is called as its base is, with every option of that. in_proj's query, key and value share one A. Each lora_A is
    drawn from U(±1/sqrt(d)) and each lora_B is zero, so that the layer starts as its base (Hu et al. 2021, arXiv
    2106.09685, section 4.1). What is merged cannot be loaded, trained, or saved with the whole layer.

    Raises TypeError for a base of another kind, NotImplementedError for one whose key or value has another size than
    its query, and for dropout, DoRA or a bias on B: an adapter in the weight has no input of its own to drop.
    """

    _unmerged_in_proj: Tensor | None
    _unmerged_out_proj: Tensor | None

    def __init__(self, base_layer: nn.MultiheadAttention, spec: LoraSpec) -> None:
        if not isinstance(base_layer, nn.MultiheadAttention):
            raise TypeError(f"LoraAttention wraps an nn.MultiheadAttention, got a {type(base_layer).__name__}")
        if base_layer.in_proj_weight is None:
            raise NotImplementedError("query, key and value of different sizes have no in_proj to adapt")
        if spec.dropout or spec.dora or spec.lora_bias:
            raise NotImplementedError(f"dropout, DoRA and lora_bias are not offered here, got {spec}")
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.enabled = True
        self.in_proj, self.out_proj = (_fresh(weight, spec) for weight in self._weights.values())
        self.register_buffer("_unmerged_in_proj", None, persistent=False)
        self.register_buffer("_unmerged_out_proj", None, persistent=False)

    def forward(self, *inputs: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """The output and the attention's weights, or None, as nn.MultiheadAttention gives them."""
        given = {} if self.merged or not self.enabled else self._effective()
        attended: tuple[Tensor, Tensor | None] = functional_call(self.base_layer, given, inputs, options)
        return attended

    @property
    def factors(self) -> tuple[Factors, Factors]:
        """The live parameters of in_proj and of out_proj."""
        into, out = self.in_proj, self.out_proj
        return Factors(into.lora_A, into.lora_B), Factors(out.lora_A, out.lora_B)

    def base_weight(self) -> tuple[Tensor, Tensor]:
        """The weights that the base multiplies by now, in_proj's and out_proj's."""
        into, out = self._weights.values()
        return into.detach(), out.detach()

    def load(self, factors: tuple[Factors, Factors]) -> None:
        """Copy the factors of in_proj and of out_proj in.

        Raises ValueError where they do not fit or their values overflow the dtype, RuntimeError while merged.
        """
        self.refuse_merged("loading other factors: the merged weights hold the old ones")
        weights, adapters = self._weights.values(), (self.in_proj, self.out_proj)
        kept = [
            held(own, adapter.spec, weight.shape[1], len(weight), weight.dtype)
            for own, adapter, weight in zip(factors, adapters, weights, strict=True)
        ]
        for adapter, own in zip(adapters, kept, strict=True):
            adapter.fill(own.a, own.b, None)

    def adapter_state(self) -> dict[str, Tensor]:
        """What training has made and an adapter file holds."""
        adapters = {"in_proj": self.in_proj, "out_proj": self.out_proj}
        return {f"{of}.{name}": own for of, part in adapters.items() for name, own in part.adapter_state().items()}

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy in what `adapter_state` gave; raises what `load` does, and ValueError for other names."""
        if state.keys() != (own := self.adapter_state()).keys():
            raise ValueError(f"this adapter's state is {', '.join(own)}, got {', '.join(state) or 'nothing'}")
        into, out = (Factors(state[f"{of}.lora_A"], state[f"{of}.lora_B"]) for of in ("in_proj", "out_proj"))
        self.load((into, out))

    def enable(self, enabled: bool) -> None:
        """Switch the adapters on or off; off gives the base layer's own output, also after a merge."""
        if not enabled:
            self.unmerge()
        self.enabled = enabled

    @property
    def merged(self) -> bool:
        return self._unmerged_in_proj is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Write W + s B A into both weights, keeping W for an exact `unmerge`; merging twice is once.

        Raises RuntimeError while the layer is off.
        """
        self.refuse_disabled()
        if not self.merged:
            merged = self._effective()
            self._unmerged_in_proj, self._unmerged_out_proj = (own.clone() for own in self._weights.values())
            self._write(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore both weights, bit for bit; without a merge nothing happens."""
        if self._unmerged_in_proj is not None and self._unmerged_out_proj is not None:
            self._write(dict(zip(self._weights, (self._unmerged_in_proj, self._unmerged_out_proj), strict=True)))
            self._unmerged_in_proj = self._unmerged_out_proj = None

    @torch.no_grad()
    def merge_and_unload(self) -> nn.MultiheadAttention:
        """A plain nn.MultiheadAttention that computes what this layer does, and shares no storage with it.

        Raises RuntimeError while the layer is off.
        """
        self.refuse_disabled()
        plain = copy.deepcopy(self.base_layer)
        if not self.merged:
            plain.load_state_dict(self._effective(), strict=False)
        return plain

    @property
    def _weights(self) -> dict[str, Tensor]:
        """The base's two weights by their names in it."""
        base = self.base_layer
        return {"in_proj_weight": base.in_proj_weight, "out_proj.weight": base.out_proj.weight}

    def _effective(self) -> dict[str, Tensor]:
        """W + s B A for both weights, summed in float32 or wider and rounded once."""
        both = zip(self._weights.items(), (self.in_proj, self.out_proj), strict=True)
        return {name: _plus(weight, adapter) for (name, weight), adapter in both}

    def _write(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in self._weights.items():
            weight.copy_(weights[name])


def _fresh(weight: Tensor, spec: LoraSpec) -> Adapter:
    """An adapter that changes nothing yet."""
    d_out, d_in = weight.shape
    return Adapter(spec, uniform(weight.new_empty(spec.rank, d_in)), weight.new_zeros(d_out, spec.rank))


def _plus(weight: Tensor, adapter: Adapter) -> Tensor:
    """W + s B A."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b = adapter.lora_A.to(wide), adapter.lora_B.to(wide)
    return torch.addmm(weight.to(wide), b, a, alpha=adapter.scaling).to(weight.dtype)
