"""What a layer computes, with its adapter loaded and before any merge."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lora_bench import definition
from lora_bench.case import cases
from lora_bench.conformance.check import WIDE, check
from lora_bench.spec import Factors

if TYPE_CHECKING:
    from lora_bench.conformance.trial import Trial

DEFINED = "forward.matches_definition"


@check("The output is W x + b + s B A x.")
def matches_definition(trial: Trial) -> None:
    trial.defined(trial.call(trial.layer(), trial.x), trial.separate_bound)


@check("The output has the dtype of the input.")
def keeps_dtype(trial: Trial) -> None:
    y = trial.call(trial.layer(), trial.x)
    trial.require(y.dtype == trial.x.dtype, f"y is {y.dtype}, wanted {trial.x.dtype}")


@check("Whatever dimensions stand before the features are kept, and every row is computed.", after=DEFINED)
def keeps_leading_dimensions(trial: Trial) -> None:
    layer = trial.layer()
    x, wanted, allowed = trial.x, definition.forward(*trial.terms), trial.separate_bound
    for leading in ((1, len(x)), (len(x), 1), (1, len(x), 1)):
        y = trial.call(layer, x.reshape(*leading, -1))
        trial.near("y", y, wanted.reshape(*leading, -1), allowed.reshape(*leading, -1))
    trial.near("y", trial.call(layer, trial.x[0]), wanted[0], allowed[0])


@check("The input is not written to.")
def leaves_input_untouched(trial: Trial) -> None:
    x = trial.x
    trial.call(trial.layer(), x)
    trial.near("x", x, trial.x)


@check("With its adapter off a layer is its base, and on again it is not.", needs=("enable",), after=DEFINED)
def disabled_is_base(trial: Trial) -> None:
    layer = trial.layer()
    trial.ask("enable", layer, False)
    trial.bare(trial.call(layer, trial.x))
    trial.ask("enable", layer, True)
    trial.defined(trial.call(layer, trial.x), trial.separate_bound)
    trial.visible(trial.effect, trial.bare_bound)


@check(
    "Dropout acts on the adapter's input alone, and in training alone.",
    after=DEFINED,
    cases=cases(dtype=WIDE),
)
def dropout_only_in_training(trial: Trial) -> None:
    spec = replace(trial.spec, dropout=0.5)
    without_effect = Factors(trial.factors.a, torch.zeros_like(trial.factors.b))
    layer = trial.layer(without_effect, spec)
    trial.train(layer, True)
    trial.bare(trial.call(layer, trial.x))

    layer = trial.layer(spec=spec)
    trial.train(layer, True)
    in_training = [trial.call(layer, trial.x) for _ in range(4)]
    trial.train(layer, False)
    # Evaluation mode may merge, as loralib's does.
    allowed = torch.maximum(trial.separate_bound, trial.merged_bound)
    trial.defined(trial.call(layer, trial.x), allowed)
    wanted = definition.forward(*trial.terms)
    differs = any(bool(((y.double() - wanted).abs() > allowed).any()) for y in in_training)
    trial.require(differs, "with a dropout of 0.5 four outputs in training are those of evaluation")
