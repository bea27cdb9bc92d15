"""Writing the adapter into the weight, and taking it out again."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import torch
from hypothesis import strategies as st

from lora_bench import bounds, definition
from lora_bench.conformance.check import BIASED, DENSE, check
from lora_bench.conformance.outcome import Raised
from lora_bench.spec import Factors

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from lora_bench.conformance.trial import Terms, Trial

UNGROUPED = {"groups": st.just(1)}
"""With groups B A is no kernel that a convolution could have."""
claim = partial(check, needs=("merge",), after="merge.equals_definition", bases=DENSE, draws=UNGROUPED)


@claim("The merged output has the dtype of the base, and so has the merged weight.")
def keeps_dtype(trial: Trial) -> None:
    merged = trial.merge(trial.layer())
    y = trial.call(merged, trial.x)
    wanted = trial.grad.dtype
    trial.require(y.dtype == wanted, f"y is {y.dtype}, wanted {wanted}")
    if trial.subject.offers("weight"):
        dtype = trial.weight_of(merged).dtype
        trial.require(dtype == wanted, f"the weight is {dtype}, wanted {wanted}")


@claim("The merged layer has the base's bias, once.", bases=BIASED, draws=UNGROUPED | {"bias": st.just(True)})
def keeps_bias(trial: Trial) -> None:
    merged = trial.merge(trial.layer())
    terms = trial.terms._replace(x=torch.zeros_like(trial.terms.x))
    y = trial.rows_of(trial.call(merged, torch.zeros_like(trial.x)))
    trial.near("y of zeros", y, definition.forward(*terms), bounds.merged(*terms, trial.arithmetic))


@claim("The merged output is (W + s B A) x + b.", after="forward.matches_definition")
def equals_definition(trial: Trial) -> None:
    merged = trial.merge(trial.layer())
    trial.defined(trial.call(merged, trial.x), trial.merged_bound)


@claim("Merging changes the output by rounding alone.")
def equals_separate(trial: Trial) -> None:
    layer = trial.layer()
    separate = trial.rows_of(trial.call(layer, trial.x)).detach().clone()
    merged = trial.rows_of(trial.call(trial.merge(layer), trial.x))
    allowed = trial.separate_bound + trial.merged_bound
    trial.near("merged y", merged, separate.double(), allowed, of=trial.asked)
    trial.visible(trial.effect, allowed)


@claim("Merging makes the base's weight W + s B A.", needs=("merge", "weight"))
def weight_becomes_w_plus_sba(trial: Trial) -> None:
    merged = trial.merge(trial.layer())
    _, weight, _, factors, scaling = trial.terms
    wanted = definition.merged_weight(weight, factors, scaling)
    allowed = bounds.merged_weight(weight, factors, scaling, trial.arithmetic)
    trial.near("the weight", trial.weight_of(merged), wanted, allowed, of=trial.asked._replace(x=None))
    trial.visible(wanted - weight.double(), allowed)


@claim("Merging twice is merging once, or it is refused.")
def twice_is_once(trial: Trial) -> None:
    layer = trial.layer()
    merged = trial.merge(layer)
    with suppress(Raised):  # a refusal must leave what was merged as it is
        merged = trial.merge(layer)
    trial.defined(trial.call(merged, trial.x), trial.merged_bound)


@claim("Unmerging restores the base's weight and the output.", needs=("merge", "unmerge"))
def unmerge_restores(trial: Trial) -> None:
    layer = trial.layer()
    trial.merge(layer)
    trial.ask("unmerge", layer)
    _, weight, _, factors, scaling = trial.terms
    slack = bounds.unmerged_weight(weight, factors, scaling, trial.arithmetic)
    if trial.subject.offers("weight"):
        trial.near(
            "the weight", trial.weight_of(layer), weight.double(), slack, of=trial.asked._replace(x=None, acting=())
        )
    trial.defined(trial.call(layer, trial.x), strayed(trial, trial.terms, slack))


@check(
    "Eight merges and unmerges later the weight has strayed by their rounding alone.",
    needs=("merge", "unmerge", "weight"),
    after="merge.unmerge_restores",
)
def cycles_do_not_drift(trial: Trial) -> None:
    layer, cycles = trial.layer(), 8
    for _ in range(cycles):
        trial.merge(layer)
        trial.ask("unmerge", layer)
    _, weight, _, factors, scaling = trial.terms
    slack = bounds.unmerged_weight(weight, factors, scaling, trial.arithmetic, cycles=cycles)
    trial.near("the weight", trial.weight_of(layer), weight.double(), slack)


@check(
    "Merging and unmerging leave A and B as they were, bit for bit.",
    needs=("merge", "unmerge", "factors"),
    after="merge.unmerge_restores",
)
def leaves_the_factors(trial: Trial) -> None:
    layer = trial.layer()
    before = trial.factors_of(layer).map(lambda tensor: tensor.detach().clone())
    trial.merge(layer)
    trial.ask("unmerge", layer)
    after = trial.factors_of(layer)
    trial.near("A", after.a, before.a)
    trial.near("B", after.b, before.b)


@check(
    "Factors loaded after an unmerge are the ones that the next merge writes.",
    needs=("merge", "unmerge"),
    after="merge.unmerge_restores",
)
def after_loading_others(trial: Trial) -> None:
    layer = trial.layer(Factors(-3 * trial.factors.a, trial.factors.b, trial.factors.bias))
    trial.merge(layer)
    trial.ask("unmerge", layer)
    trial.ask("load", layer, trial.factors)
    merged = trial.call(trial.merge(layer), trial.x)
    _, weight, _, factors, scaling = trial.terms
    slack = bounds.unmerged_weight(
        weight, Factors(3 * factors.a.double(), factors.b.double()), scaling, trial.arithmetic
    )
    trial.defined(merged, strayed(trial, trial.terms, slack, bounds.merged))


@check(
    "Merged at a scale the weight holds so many times the adapter, and unmerging takes all of it out.",
    needs=("merge_scaled", "unmerge"),
    after="forward.matches_definition",
)
def scaled_merges_and_unmerges(trial: Trial) -> None:
    factor = 0.5
    layer = trial.layer()
    merged = trial.ask("merge_scaled", layer, factor)
    scaled = trial.terms._replace(scaling=factor * trial.terms.scaling)
    y = trial.call(layer if merged is None else merged, trial.x)
    asked = trial.asked._replace(acting=(factor,))
    trial.near("merged y", y, definition.forward(*scaled), bounds.merged(*scaled, trial.arithmetic), of=asked)
    trial.ask("unmerge", layer)
    _, weight, _, factors, scaling = scaled
    slack = bounds.unmerged_weight(weight, factors, scaling, trial.arithmetic)
    trial.defined(trial.call(layer, trial.x), strayed(trial, trial.terms, slack))


@claim(
    "What is deployed, merged and without an adapter, computes (W + s B A) x + b.",
    needs=("merge_and_unload",),
    after="forward.matches_definition",
)
def and_unload_equals_definition(trial: Trial) -> None:
    unloaded = trial.ask("merge_and_unload", trial.layer())
    trial.defined(trial.call(unloaded, trial.x), trial.merged_bound)


def strayed(trial: Trial, terms: Terms, slack: Tensor, bound: Callable[..., Tensor] = bounds.separate) -> Tensor:
    """How far an output may stray that is computed with any weight within `slack` of that of the terms.

    By its own rounding, at the furthest weight, and by what the slack makes of x.
    """
    furthest = terms._replace(weight=terms.weight.double().abs() + slack)
    return bound(*furthest, trial.arithmetic) + terms.x.double().abs() @ slack.T
