"""A bias on B (PEFT's `lora_bias`): the adapter adds s (B A x + its bias)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from hypothesis import strategies as st

from lora_bench import bounds, definition
from lora_bench.case import QUANTISED
from lora_bench.conformance.check import BIASED, check
from lora_bench.conformance.training import gradients, judge_trained, sizes

if TYPE_CHECKING:
    from torch import Tensor

    from lora_bench.conformance.trial import Trial

DRAWS = {"lora_bias": st.just(True)}
MERGED = DRAWS | {"bias": st.just(True)}  # without a bias of the base there is nothing to merge it into


@check("The output is W x + b + s (B A x + the adapter's bias).", bases=BIASED, draws=DRAWS)
def matches_definition(trial: Trial) -> None:
    trial.defined(trial.call(trial.layer(), trial.x), trial.separate_bound)


@check("A, B and the adapter's bias train, and nothing else does.", draws=DRAWS)
def trains(trial: Trial) -> None:
    judge_trained(trial, trial.wrap(), sizes(trial) | {"its bias": trial.case.d_out})


@check(
    "The gradient of the adapter's bias is s times that of the output, summed.",
    needs=("factors",),
    after="lora_bias.matches_definition",
    draws=DRAWS,
)
def gradient_matches_formula(trial: Trial) -> None:
    layer = trial.layer()
    trial.backward(trial.call(layer, trial.x), trial.grad)
    live = trial.tensor_of("the adapter's bias", trial.factors_of(layer).bias)
    wanted, allowed = gradients(trial, trial.terms.factors)
    trial.near("grad of the bias", trial.gradient_of("the bias", live), wanted.b[:, -1], allowed.b[:, -1])
    trial.visible(wanted.b[:, -1], allowed.b[:, -1])


@check(
    "Merged, the output is (W + s B A) x + b + s times the adapter's bias.",
    needs=("merge",),
    after="lora_bias.matches_definition",
    bases=BIASED,
    draws=MERGED,
)
def merged_equals_definition(trial: Trial) -> None:
    trial.defined(trial.call(trial.merge(trial.layer()), trial.x), trial.merged_bound + stored_bias(trial))


def stored_bias(trial: Trial) -> Tensor:
    """What the base's bias loses as its sum with the adapter's is stored; the adapter's own loss is in the bound."""
    assert trial.terms.bias is not None
    return trial.arithmetic.growth((), 1) * trial.terms.bias.double().abs()


@check(
    "Merged, the bias is b + s times the adapter's bias, whatever the merge makes of W.",
    needs=("merge",),
    bases=("linear", *QUANTISED),
    draws=MERGED,
)
def merged_bias_is_scaled(trial: Trial) -> None:
    y = trial.call(trial.merge(trial.layer()), torch.zeros_like(trial.x))
    nothing = torch.zeros_like(trial.terms.x)
    nothing[:, -1] = 1  # the feature that B's bias is a column for
    terms = trial.terms._replace(x=nothing)
    allowed = bounds.merged(*terms, trial.arithmetic) + stored_bias(trial)
    asked = trial.asked._replace(x=torch.zeros_like(trial.asked.rows))
    trial.near("y of zeros", y, definition.forward(*terms), allowed, of=asked)
    trial.visible(definition.delta(nothing, terms.factors, terms.scaling), allowed)


@check(
    "Unmerged, the bias is that of the base again.",
    needs=("merge", "unmerge"),
    after="lora_bias.merged_equals_definition",
    draws=MERGED,
)
def unmerge_restores(trial: Trial) -> None:
    layer = trial.layer()
    trial.merge(layer)
    trial.ask("unmerge", layer)
    x, weight, bias, factors, scaling = trial.terms
    assert bias is not None
    slack = bounds.unmerged_weight(torch.cat([weight[:, :-1], bias[:, None]], 1), factors, scaling, trial.arithmetic)
    furthest = trial.terms._replace(
        weight=torch.cat([weight.double()[:, :-1].abs() + slack[:, :-1], weight.double()[:, -1:]], 1),
        bias=bias.double().abs() + slack[:, -1],
    )
    trial.defined(trial.call(layer, trial.x), bounds.separate(*furthest, trial.arithmetic) + x.double().abs() @ slack.T)
