"""DoRA (Liu et al. 2024, arXiv 2402.09353): W + s B A as a direction, with a magnitude that is trained as well."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from hypothesis import strategies as st

from lora_bench import definition, dora
from lora_bench.conformance.check import WIDE, check
from lora_bench.conformance.training import judge_trained, sizes

if TYPE_CHECKING:
    from torch import Tensor

    from lora_bench.conformance.trial import Trial

DRAWS = {"dora": st.just(True)}
DEFINED = "dora.matches_definition"
MERGED = "dora.merged_equals_definition"
claim = partial(check, after=DEFINED, draws=DRAWS)


@check("A fresh layer's output is that of its base.", draws=DRAWS)
def is_identity(trial: Trial) -> None:
    x, weight, bias, factors, scaling = trial.terms
    fresh = factors.map(torch.zeros_like)
    norms = dora.norms(weight, fresh, scaling)
    terms = (x, weight, bias, replace(fresh, magnitude=norms), scaling)
    # The magnitude was computed and stored, as every norm is.
    own = dora.norm_bound(weight, fresh, scaling, trial.arithmetic) / norms * (x.double() @ weight.double().T).abs()
    y = trial.call(trial.wrap(), trial.x)
    trial.near("y", y, definition.base(x, weight, bias), dora.separate_bound(*terms, trial.arithmetic) + own)


@check("The output is m (W + s B A) x / |W + s B A| + b, the norm being that of each output's weights.", draws=DRAWS)
def matches_definition(trial: Trial) -> None:
    judge(trial, trial.call(trial.layer(), trial.x), dora.separate_bound(*trial.terms, trial.arithmetic))


@check("A, B and the magnitude require a gradient, and nothing else does.", draws=DRAWS)
def trains(trial: Trial) -> None:
    judge_trained(trial, trial.wrap(), sizes(trial) | {"the magnitude": trial.case.d_out})


@claim(
    "The gradients of A, B, x and the magnitude are those of the formulas, the norm being a constant (section 4.3).",
    needs=("factors",),
)
def gradients_match_formulas(trial: Trial) -> None:
    layer, x = trial.layer(), trial.x.requires_grad_()
    trial.backward(trial.call(layer, x), trial.grad)
    live = trial.factors_of(layer)
    rows, weight, bias, factors, scaling = trial.terms
    terms = (rows, trial.grad, weight, factors, scaling)
    wanted = dora.gradients(*terms)
    allowed = dora.gradient_bounds(*terms, trial.arithmetic, bias=bias)
    for name in ("a", "b", "magnitude"):
        leaf = trial.tensor_of(f"the live {name}", getattr(live, name))
        found = trial.gradient_of(name, leaf).view_as(getattr(wanted, name))
        trial.near(f"grad of {name}", found, getattr(wanted, name), getattr(allowed, name))
    trial.near("grad of x", trial.tensor_of("the gradient of x", x.grad), wanted.x, allowed.x)
    trial.visible(wanted.magnitude, allowed.magnitude)


@claim("Merged, the output is the definition's.", needs=("merge",))
def merged_equals_definition(trial: Trial) -> None:
    merged = trial.merge(trial.layer())
    judge(trial, trial.call(merged, trial.x), dora.merged_bound(*trial.terms, trial.arithmetic))


@claim("Merging makes the base's weight m (W + s B A) / |W + s B A|.", needs=("merge", "weight"), after=MERGED)
def weight_becomes_the_definition(trial: Trial) -> None:
    merged = trial.merge(trial.layer())
    _, weight, _, factors, scaling = trial.terms
    wanted = dora.merged_weight(weight, factors, scaling)
    allowed = dora.merged_weight_bound(weight, factors, scaling, trial.arithmetic)
    trial.near("the weight", trial.weight_of(merged), wanted, allowed)
    trial.visible(wanted - weight.double(), allowed)


@claim(
    "Unmerging restores the base's weight.",
    needs=("merge", "unmerge", "weight"),
    after=MERGED,
    draws=DRAWS | {"dtype": WIDE},
)
def unmerge_restores(trial: Trial) -> None:
    layer = trial.layer()
    trial.merge(layer)
    trial.ask("unmerge", layer)
    _, weight, _, factors, scaling = trial.terms
    slack = dora.unmerged_weight_bound(weight, factors, scaling, trial.arithmetic)
    trial.near("the weight", trial.weight_of(layer), weight.double(), slack)


@claim("What is deployed computes the definition.", needs=("merge_and_unload",))
def unloaded_equals_definition(trial: Trial) -> None:
    unloaded = trial.ask("merge_and_unload", trial.layer())
    judge(trial, trial.call(unloaded, trial.x), dora.merged_bound(*trial.terms, trial.arithmetic))


def judge(trial: Trial, y: Tensor, allowed: Tensor) -> None:
    """Fail unless y is the definition's output, within a bound that the base's or plain LoRA's would break."""
    wanted = dora.forward(*trial.terms)
    trial.near("y", y, wanted, allowed, of=trial.asked)
    for plain in (definition.forward(*trial.terms), definition.base(*trial.terms[:3])):
        trial.visible(wanted - plain, allowed)
