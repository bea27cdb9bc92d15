"""The zoo: implementations with one planted bug each, by the check that must find it.

A check that nothing trips proves nothing. Each specimen is the reference with one thing changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_bench.reference import REFERENCE, LoraLinear, batched
from lora_bench.spec import Factors, LoraSpec
from lora_bench.subject import Layer, Subject


def bug(**verbs: Any) -> Subject:
    """The reference with other verbs."""
    return replace(REFERENCE, name="acme", **verbs)


def specified(**changes: Callable[[LoraSpec], Any]) -> Subject:
    """The reference, taking a spec for another one."""

    def wrap(base: Layer, spec: LoraSpec) -> Layer:
        return LoraLinear(base, replace(spec, **{name: change(spec) for name, change in changes.items()}))

    return bug(wrap=wrap)


def left_as_it_was(base: nn.Linear, spec: LoraSpec) -> LoraLinear:
    """Forgets to freeze the base."""
    trainable = base.weight.requires_grad
    layer = LoraLinear(base, spec)
    layer.base_layer.requires_grad_(trainable)
    return layer


def wrapped(change: Callable[[Layer], object]) -> Subject:
    """The reference with something done to each layer once it is wrapped."""

    def wrap(base: Layer, spec: LoraSpec) -> Layer:
        layer = LoraLinear(base, spec)
        change(layer)
        return layer

    return bug(wrap=wrap)


def computing(forward: Callable[[Layer, Tensor], Any], **members: Any) -> Subject:
    """The reference with another forward."""
    return bug(wrap=type("Acme", (LoraLinear,), {"forward": forward, **members}))


def merging(delta: Callable[[Layer], Tensor]) -> Subject:
    """The reference with another merge, which adds something else than s B A each time it is called."""

    @torch.no_grad()
    def merge(layer: Layer) -> object:
        layer.base_layer.weight += delta(layer)
        return layer.base_layer

    return bug(merge=merge)


def routed(change: Callable[[Tensor], Tensor]) -> Subject:
    """The reference, sending rows elsewhere."""
    return bug(plan=lambda ids, device: batched.plan(change(ids), device))


correct = LoraLinear.forward


def delta(layer: Layer, x: Tensor) -> Tensor:
    """What the adapter adds to the output."""
    return layer.spec.scaling * x @ layer.lora_A.T @ layer.lora_B.T


def ba(layer: Layer) -> Tensor:
    """What the adapter adds to the weight."""
    return layer.spec.scaling * layer.lora_B @ layer.lora_A


def dropped(x: Tensor, training: bool) -> Tensor:
    return functional.dropout(x, 0.5, training)


def truncated(layer: Layer, x: Tensor) -> Tensor:
    return layer.base_layer(x) + layer.spec.scaling * x @ layer.lora_A[:-1].T @ layer.lora_B[:, :-1].T


def narrow(layer: Layer, x: Tensor) -> Tensor:
    a, b = layer.lora_A.bfloat16(), layer.lora_B.bfloat16()
    return layer.base_layer(x) + (layer.spec.scaling * x.bfloat16() @ a.T @ b.T).to(x.dtype)


def twice_biased(layer: Layer, x: Tensor) -> Tensor:
    bias = layer.base_layer.bias
    return correct(layer, x) + (0 if bias is None else bias)


def half_the_gradient(layer: Layer, x: Tensor) -> Tensor:
    change = delta(layer, x) / 2
    return layer.base_layer(x) + change + change.detach()


def skipped_at_zero(layer: Layer, x: Tensor) -> Tensor:
    return correct(layer, x) if layer.lora_B.any() else layer.base_layer(x)


def detached(layer: Layer, x: Tensor) -> Tensor:
    return layer.base_layer(x) + layer.spec.scaling * (x @ layer.lora_A.T).detach() @ layer.lora_B.T


def turned(layer: Layer) -> Tensor:
    return ba(layer).T if layer.lora_A.shape[1] == layer.lora_B.shape[0] else ba(layer)


def without_bias(layer: Layer) -> Layer:
    unloaded = layer.merge_and_unload()
    unloaded.bias = None
    return unloaded


def dense_and_trained(layer: Layer) -> None:
    base = layer.base_layer
    layer.base_layer = nn.Linear(base.in_features, base.out_features, device="meta")
    layer.base_layer.weight, layer.base_layer.bias = nn.Parameter(base.dequantise()), base.bias


def offset_forgotten(layer: Layer) -> None:
    if hasattr(layer.base_layer, "offset"):
        layer.base_layer.offset.zero_()


def one_scale(layer: Layer, adapters: list[tuple[LoraSpec, Factors]]) -> object:
    scaling = adapters[0][0].scaling
    return batched.pool(layer, [(LoraSpec(spec.rank, scaling * spec.rank), factors) for spec, factors in adapters])


def lenient(layer: Layer, pool: Any, x: Tensor, ids: Tensor) -> Tensor:
    adapters, slots = pool
    return batched.route(layer, slots, x, batched.plan(ids.where(ids < adapters, -1).clamp(min=-1), "cpu"))


# The check that must fail -> the bug -> an implementation that has it.
SPECIMENS: dict[str, dict[str, Subject]] = {
    "forward.matches_definition": {
        "the scale is alpha": specified(alpha=lambda spec: spec.alpha * spec.rank),
        "rslora is ignored": specified(rslora=lambda _: False),
        "a millionth off": computing(lambda layer, x: correct(layer, x) + 1e-6 * delta(layer, x)),
        "the last rank is dropped": computing(truncated),
        "the adapter is in bf16": computing(narrow),
        "the bias is added twice": computing(twice_biased),
        "the adapter is dropped": computing(lambda layer, x: layer.base_layer(x)),
        "features are rolled": computing(lambda layer, x: layer.base_layer(x) + delta(layer, x.roll(1, -1))),
        "it raises": computing(lambda _layer, _x: 1 / 0),
        "it returns nothing": computing(lambda _layer, _x: None),
    },
    "forward.keeps_dtype": {"fp32 comes out": computing(lambda layer, x: correct(layer, x).float())},
    "forward.keeps_leading_dimensions": {
        "the output is flat": computing(lambda layer, x: correct(layer, x).flatten(0, -2)),
        "the first token only": computing(lambda layer, x: layer.base_layer(x) + delta(layer, x[..., :1, :])),
    },
    "forward.leaves_input_untouched": {"scaled in place": computing(lambda layer, x: correct(layer, x.mul_(2)))},
    "forward.disabled_is_base": {
        "off is ignored": bug(enable=lambda _layer, _enabled: None),
        "off for good": bug(enable=lambda layer, _enabled: layer.enable(False)),
    },
    "forward.dropout_only_in_training": {
        "in evaluation too": computing(lambda layer, x: layer.base_layer(x) + delta(layer, dropped(x, True))),
        "on the base's input": computing(lambda layer, x: correct(layer, dropped(x, layer.training))),
        "never": specified(dropout=lambda _: 0.0),
    },
    "init.is_identity": {"B is random": wrapped(lambda layer: nn.init.normal_(layer.lora_B))},
    "init.a_is_random_b_is_zero": {
        "both are random": wrapped(lambda layer: nn.init.normal_(layer.lora_B)),
        "both are zero": wrapped(lambda layer: nn.init.zeros_(layer.lora_A)),
    },
    "training.only_factors_train": {
        "the base is not frozen": bug(wrap=left_as_it_was),
        "the base trains": wrapped(lambda layer: layer.base_layer.requires_grad_(True)),
        "A is frozen": wrapped(lambda layer: layer.lora_A.requires_grad_(False)),
    },
    "training.parameter_count": {
        "a scale of its own": wrapped(lambda layer: layer.register_parameter("scale", nn.Parameter(torch.ones(1))))
    },
    "training.gradients_match_formulas": {
        "half the gradient": computing(half_the_gradient),
        "the hidden is detached": computing(detached),
    },
    "training.gradcheck": {"half the gradient": computing(half_the_gradient)},
    "training.base_is_untouched_by_a_step": {
        "the base trains": wrapped(lambda layer: layer.base_layer.requires_grad_(True)),
        "A does not move": computing(detached),
    },
    "training.gradient_at_zero_b": {"skipped while B is zero": computing(skipped_at_zero)},
    "merge.keeps_dtype": {"fp32 comes out": bug(merge=lambda layer: lambda x: layer(x).float())},
    "merge.keeps_bias": {"the bias is lost": bug(merge=without_bias)},
    "merge.equals_definition": {
        "the sign is wrong": merging(lambda layer: -ba(layer)),
        "there is no scale": merging(lambda layer: layer.lora_B @ layer.lora_A),
        "transposed where square": merging(turned),
        "the delta is in bf16": merging(lambda layer: ba(layer).bfloat16()),
    },
    "merge.equals_separate": {"the adapter is dropped": bug(merge=lambda layer: layer.base_layer)},
    "merge.weight_becomes_w_plus_sba": {"nothing is written": bug(merge=lambda _layer: None)},
    "merge.twice_is_once": {"twice is twice": merging(ba)},
    "merge.unmerge_restores": {
        "nothing is restored": bug(unmerge=lambda _layer: None),
        "the adapter is lost": bug(unmerge=lambda layer: (layer.unmerge(), layer.enable(False))),
    },
    "merge.and_unload_equals_definition": {"it is the base": bug(merge_and_unload=lambda layer: layer.base_layer)},
    "batch.rows_equal_single_rows": {
        "all get the first adapter": routed(torch.zeros_like),
        "all get the base": routed(lambda ids: torch.full_like(ids, -1)),
        "row i gets that of row j": routed(lambda ids: ids.flip(0)),
        "all get the first scale": bug(pool=one_scale),
    },
    "batch.minus_one_is_base": {"-1 is the first adapter": routed(lambda ids: ids.clamp(min=0))},
    "batch.neighbours_do_not_leak": {
        "all get the last row's adapter": routed(lambda ids: ids[-1:].expand_as(ids)),
        "the mean leaks in": bug(route=lambda layer, pool, x, plan: batched.route(layer, pool, x + x.mean(0), plan)),
    },
    "batch.unknown_id_raises": {
        "taken for the base": bug(
            pool=lambda layer, adapters: (len(adapters), batched.pool(layer, adapters)), plan=None, route=lenient
        )
    },
    "batch.empty_and_single_row": {
        "one row is squeezed": bug(route=lambda *arguments: batched.route(*arguments).squeeze(0))
    },
    "four_bit.matches_definition": {
        "the statistics' offset is forgotten": wrapped(offset_forgotten),
        "the adapter is dropped": computing(lambda layer, x: layer.base_layer(x)),
    },
    "four_bit.base_stays_frozen": {"made dense and trained": wrapped(dense_and_trained)},
    "four_bit.gradients_match_formulas": {"half the gradient": computing(half_the_gradient)},
    "state.has_exactly_a_and_b": {
        "the base is in it": bug(state=lambda layer: layer.state_dict()),
        "A is not": bug(state=lambda layer: {"lora_B": layer.lora_B}),
        "B is another": bug(state=lambda layer: {"lora_A": layer.lora_A, "lora_B": layer.lora_B + 1}),
    },
    "state.survives_deepcopy": {"it is no copy": computing(correct, __deepcopy__=lambda layer, _memo: layer)},
}
