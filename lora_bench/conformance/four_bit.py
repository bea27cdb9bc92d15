"""LoRA over a 4-bit base (QLoRA, arXiv 2305.14314, equation 5), judged with the weight that the 4 bits stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import strategies as st

from lora_bench import bounds, definition
from lora_bench.case import cases
from lora_bench.conformance.check import WIDE, check
from lora_bench.conformance.training import judge_gradients, judge_steps

if TYPE_CHECKING:
    from lora_bench.conformance.trial import Trial

BASES = ("nf4", "linear4bit")
# Up to several blocks of 64 values, with and without a broken last one.
SHAPES = {"d_in": st.sampled_from([5, 8, 32, 64]), "d_out": st.sampled_from([1, 4, 7, 16])}


@check(
    "The output is W x + b + s B A x with the dequantised W.",
    after="forward.matches_definition",
    bases=BASES,
    cases=cases(**SHAPES),
)
def matches_definition(trial: Trial) -> None:
    layer = trial.layer()
    y = trial.call(layer, trial.x)
    terms = trial.terms._replace(weight=trial.base_weight)
    allowed = bounds.separate(*terms, trial.arithmetic)
    trial.near("y", y, definition.forward(*terms), allowed)
    if trial.subject.offers("weight"):
        said = terms._replace(weight=trial.weight_of(layer))
        trial.near("y", y, definition.forward(*said), bounds.separate(*said, trial.arithmetic))
    trial.visible(trial.effect, allowed)
    # With the weight as it was before it was quantised the output would be another.
    trial.visible(terms.x.double() @ (terms.weight.double() - trial.terms.weight.double()).T, allowed)


@check(
    "Optimiser steps move A and B and leave the 4-bit base as it was, bit for bit.",
    needs=("weight",),
    bases=BASES,
    cases=cases(dtype=WIDE, **SHAPES),
)
def base_stays_frozen(trial: Trial) -> None:
    judge_steps(trial, trial.layer())


@check(
    "The gradients of A, B and x are those of the formulas with the dequantised W.",
    needs=("factors",),
    after="four_bit.matches_definition",
    bases=BASES,
    cases=cases(**SHAPES),
)
def gradients_match_formulas(trial: Trial) -> None:
    judge_gradients(trial, trial.layer(), trial.base_weight)
