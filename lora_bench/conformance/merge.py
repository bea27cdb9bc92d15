"""Writing the adapter into the weight, and taking it out again."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from hypothesis import strategies as st

from lora_bench import bounds, definition
from lora_bench.case import cases
from lora_bench.conformance.check import check
from lora_bench.conformance.outcome import Raised

if TYPE_CHECKING:
    from lora_bench.conformance.trial import Trial


@check("The merged output has the dtype of the input, and the merged weight that of the base.", needs=("merge",))
def keeps_dtype(trial: Trial) -> None:
    merged = trial.merge(trial.layer())
    y = trial.call(merged, trial.x)
    trial.require(y.dtype == trial.x.dtype, f"y is {y.dtype}, wanted {trial.x.dtype}")
    if trial.subject.offers("weight"):
        dtype = trial.weight_of(merged).dtype
        trial.require(dtype == trial.x.dtype, f"the weight is {dtype}, wanted {trial.x.dtype}")


@check(
    "The merged layer has the base's bias, once.",
    needs=("merge",),
    after="forward.matches_definition",
    cases=cases(bias=st.just(True)),
)
def keeps_bias(trial: Trial) -> None:
    merged = trial.merge(trial.layer())
    terms = trial.terms._replace(x=torch.zeros_like(trial.x))
    y = trial.call(merged, torch.zeros_like(trial.x))
    trial.near("y of zeros", y, definition.forward(*terms), bounds.merged(*terms, trial.arithmetic))


@check("The merged output is (W + s B A) x + b.", needs=("merge",), after="merge.keeps_bias")
def equals_definition(trial: Trial) -> None:
    merged = trial.merge(trial.layer())
    trial.defined(trial.call(merged, trial.x), trial.merged_bound)


@check("Merging changes the output by rounding alone.", needs=("merge",), after="merge.equals_definition")
def equals_separate(trial: Trial) -> None:
    layer = trial.layer()
    separate = trial.call(layer, trial.x).detach().clone()
    merged = trial.call(trial.merge(layer), trial.x)
    allowed = trial.separate_bound + trial.merged_bound
    trial.near("merged y", merged, separate.double(), allowed)
    trial.visible(trial.effect, allowed)


@check("Merging makes the base's weight W + s B A.", needs=("merge", "weight"), after="merge.equals_definition")
def weight_becomes_w_plus_sba(trial: Trial) -> None:
    merged = trial.merge(trial.layer())
    _, weight, _, factors, scaling = trial.terms
    wanted = definition.merged_weight(weight, factors, scaling)
    allowed = bounds.merged_weight(weight, factors, scaling, trial.arithmetic)
    trial.near("the weight", trial.weight_of(merged), wanted, allowed)
    trial.visible(wanted - weight.double(), allowed)


@check("Merging twice is merging once, or it is refused.", needs=("merge",), after="merge.equals_definition")
def twice_is_once(trial: Trial) -> None:
    layer = trial.layer()
    merged = trial.merge(layer)
    with suppress(Raised):  # a refusal must leave what was merged as it is
        merged = trial.merge(layer)
    trial.defined(trial.call(merged, trial.x), trial.merged_bound)


@check(
    "Unmerging restores the base's weight and the output.",
    needs=("merge", "unmerge"),
    after="merge.equals_definition",
)
def unmerge_restores(trial: Trial) -> None:
    layer = trial.layer()
    trial.merge(layer)
    trial.ask("unmerge", layer)
    x, weight, _, factors, scaling = trial.terms
    slack = bounds.unmerged_weight(weight, factors, scaling, trial.arithmetic)
    if trial.subject.offers("weight"):
        trial.near("the weight", trial.weight_of(layer), weight.double(), slack)
    # Computed from any weight within the slack of W, the output strays by its own rounding and by the slack.
    furthest = trial.terms._replace(weight=weight.double().abs() + slack)
    own = bounds.separate(*furthest, trial.arithmetic)
    trial.defined(trial.call(layer, trial.x), own + x.double().abs() @ slack.T)


@check(
    "What is deployed, merged and without an adapter, computes (W + s B A) x + b.",
    needs=("merge_and_unload",),
    after="forward.matches_definition",
)
def and_unload_equals_definition(trial: Trial) -> None:
    unloaded = trial.ask("merge_and_unload", trial.layer())
    trial.defined(trial.call(unloaded, trial.x), trial.merged_bound)
