"""No timing without proof: bugs planted in a forward are found in every set-up, at their layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_bench.bench.proof import Wrong
from lora_bench.bench.workload import TARGETS
from lora_bench.models.inject import find_targets
from lora_bench.reference import REFERENCE, LoraLinear, batched
from lora_bench.reference.layer import dense_weight
from lora_bench.spec import Factors, LoraSpec
from lora_bench.subject import Subject
from tests.planted_subjects import Dropped
from tests.proven_arms import ADAPTERS, COMPUTING, FIRST, LAYERS, base_of, proven, scaled, wrapping

# --- separate -------------------------------------------------------------------------------------------------------


class Narrow(LoraLinear):
    """Computes and answers in bfloat16 whatever the model's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        w, a, b = (factor.bfloat16() for factor in (dense_weight(self.base_layer), self.lora_A, self.lora_B))
        hidden = functional.linear(x.bfloat16(), a) * self.spec.scaling
        return functional.linear(x.bfloat16(), w) + functional.linear(hidden, b)


class Undefined(LoraLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * math.nan


def of_another_layer() -> Subject:
    """Loads into every layer what the first of its shape got."""
    first: dict[tuple[torch.Size, torch.Size], Factors] = {}

    def load(layer: LoraLinear, factors: Factors) -> None:
        layer.load(first.setdefault((factors.a.shape, factors.b.shape), factors))

    return replace(REFERENCE, load=load)


def dropped_in_the_last_layer() -> Subject:
    made: list[LoraLinear] = []

    def wrap(base: Any, spec: LoraSpec) -> LoraLinear:
        made.append((Dropped if len(made) == LAYERS - 1 else LoraLinear)(base, spec))
        return made[-1]

    return wrapping(wrap)


SEPARATE = {
    "dropped": (lambda: wrapping(Dropped), FIRST),
    "not a number": (lambda: wrapping(Undefined), FIRST),
    "scale + 1 %": (lambda: scaled(1.01), FIRST),
    "scale - 1 %": (lambda: scaled(0.99), FIRST),
    "sign": (lambda: scaled(-1), FIRST),
    "another layer's": (of_another_layer, "model.layers.0.self_attn.v_proj"),
    "one layer of many": (dropped_in_the_last_layer, "model.layers.1.mlp.down_proj"),
}


@pytest.mark.parametrize("phase", COMPUTING)
@pytest.mark.parametrize(("plant", "layer"), SEPARATE.values(), ids=SEPARATE.keys())
def test_a_wrong_adapter_beside_the_base_is_found_at_its_layer(
    plant: Callable[[], Subject], layer: str, phase: str
) -> None:
    with pytest.raises(
        Wrong, match=rf"^{layer}: found \S+ at \[\d+,\d+\], wanted \S+; error \S+, allowed \S+ \(x\S+\)$"
    ):
        proven(plant(), "separate", phase)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_half_precision_is_not_excused_by_an_output_in_half_precision(phase: str) -> None:
    with pytest.raises(Wrong, match=f"^{FIRST}: found .* allowed"):
        proven(wrapping(Narrow), "separate", phase)


@pytest.mark.parametrize("dtype", ["fp64", "bf16", "fp16"])
def test_a_dropped_adapter_is_found_in_every_dtype(dtype: str) -> None:
    with pytest.raises(Wrong, match=f"^{FIRST}: found"):
        proven(wrapping(Dropped), "separate", "decode", dtype)


# --- merged ---------------------------------------------------------------------------------------------------------


def without_scale(layer: LoraLinear) -> nn.Module:
    layer.scaling = 1.0
    return layer.merge_and_unload()


def twice(layer: LoraLinear) -> nn.Module:
    layer.scaling *= 2
    return layer.merge_and_unload()


def beside_the_adapter(layer: LoraLinear) -> LoraLinear:
    dense_weight(layer.base_layer).copy_(layer.merged_weight())
    return layer


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize(
    "merge_and_unload",
    [without_scale, twice, beside_the_adapter, lambda layer: layer.base_layer],
    ids=["no scale", "twice", "beside the adapter", "of nothing"],
)
def test_a_wrong_merge_is_found(merge_and_unload: Callable[[LoraLinear], nn.Module], phase: str) -> None:
    with torch.no_grad(), pytest.raises(Wrong, match=f"^{FIRST}: found .* allowed"):
        proven(replace(REFERENCE, merge_and_unload=merge_and_unload), "merged", phase)


# --- batched --------------------------------------------------------------------------------------------------------


def rerouted(change: Callable[[Tensor], Tensor]) -> Subject:
    return replace(REFERENCE, plan=lambda ids, device: batched.plan(change(ids), device))


def another_slot_s_scale(layer: LoraLinear, adapters: Sequence[tuple[LoraSpec, Factors]]) -> batched.Pool:
    specs = [spec for spec, _ in adapters]
    mixed = zip([*specs[1:], specs[0]], (factors for _, factors in adapters), strict=True)
    return batched.pool(layer, list(mixed))


BATCHED = {
    "the neighbour's": (rerouted(lambda ids: (ids + 1) % ADAPTERS), 0),
    "the first for every row": (rerouted(torch.zeros_like), 1),
    "the last row's for every row": (rerouted(lambda ids: ids[-1].expand(len(ids))), 1),
    "reversed": (rerouted(lambda ids: ids.flip(0)), 1),
    "none for the last": (rerouted(lambda ids: torch.where(ids == ADAPTERS - 1, -1, ids)), ADAPTERS - 1),
    "another slot's scale": (replace(REFERENCE, pool=another_slot_s_scale), 0),
}


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize(("subject", "adapter"), BATCHED.values(), ids=BATCHED.keys())
def test_a_row_of_a_batch_that_goes_wrong_is_found_with_its_adapter(subject: Subject, adapter: int, phase: str) -> None:
    with pytest.raises(Wrong, match=f"^{FIRST}, adapter {adapter}: found .* allowed"):
        proven(subject, "batched", phase)


# --- four_bit -------------------------------------------------------------------------------------------------------


class Dense(LoraLinear):
    """Multiplies by the weight as it was before it was quantised."""

    dense: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.dense) + super().forward(x) - self.base_layer(x)


def dense_instead_of_dequantised() -> Subject:
    originals = iter(find_targets(base_of("fp32"), TARGETS).values())

    def wrap(base: Any, spec: LoraSpec) -> LoraLinear:
        layer = Dense(base, spec)
        layer.dense = next(originals).weight  # type: ignore[assignment]
        return layer

    return wrapping(wrap)


FOUR_BIT = {
    "dense weights": dense_instead_of_dequantised,
    "dropped": lambda: wrapping(Dropped),
    "scale + 1 %": lambda: scaled(1.01),
}


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("plant", FOUR_BIT.values(), ids=FOUR_BIT.keys())
def test_a_wrong_layer_over_four_bits_is_found(plant: Callable[[], Subject], phase: str) -> None:
    with pytest.raises(Wrong, match=f"^{FIRST}: found .* allowed"):
        proven(plant(), "four_bit", phase)
