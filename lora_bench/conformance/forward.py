"""What a layer computes, with its adapter loaded and before any merge."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from hypothesis import strategies as st

from lora_bench import bounds, definition
from lora_bench.conformance.check import ANY_BASE, DENSE, WIDE, check
from lora_bench.conformance.outcome import Raised
from lora_bench.spec import Factors

if TYPE_CHECKING:
    from lora_bench.conformance.trial import Trial

DEFINED = "forward.matches_definition"


@check("The output is W x + b + s B A x.", bases=DENSE)
def matches_definition(trial: Trial) -> None:
    trial.defined(trial.call(trial.layer(), trial.x), trial.separate_bound)


@check("The output has the dtype of the base.", bases=ANY_BASE)
def keeps_dtype(trial: Trial) -> None:
    y = trial.call(trial.layer(), trial.x)
    trial.require(y.dtype == trial.grad.dtype, f"y is {y.dtype}, wanted {trial.grad.dtype}")


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


@check(
    "With its adapter off a layer is its base, and on again it is not.",
    needs=("enable",),
    after=DEFINED,
    bases=DENSE,
)
def disabled_is_base(trial: Trial) -> None:
    layer = trial.layer()
    trial.ask("enable", layer, False)
    trial.bare(trial.call(layer, trial.x))
    trial.ask("enable", layer, True)
    trial.defined(trial.call(layer, trial.x), trial.separate_bound)
    trial.visible(trial.effect, trial.bare_bound)


@check(
    "Scaled by a factor the adapter adds that much more, and scaled by 1 again as before.",
    needs=("scale",),
    after=DEFINED,
)
def scale_multiplies(trial: Trial) -> None:
    layer = trial.layer()
    for factor in (2.5, 0.0, 1.0):
        trial.ask("scale", layer, factor)
        terms = trial.terms._replace(scaling=factor * trial.terms.scaling)
        y = trial.rows_of(trial.call(layer, trial.x))
        # Besides what any scaling costs, the factor is multiplied in.
        asked = trial.asked._replace(acting=(factor,))
        allowed = bounds.separate(*terms, trial.arithmetic, sums=2)
        trial.near("y", y, definition.forward(*terms), allowed, of=asked)
    trial.visible(trial.effect, trial.separate_bound)


@check("A call that raises leaves the layer as it was.", after=DEFINED)
def error_leaves_no_trace(trial: Trial) -> None:
    layer = trial.layer()
    with suppress(Raised):  # there is no such input; what matters is what comes after
        trial.call(layer, torch.cat([trial.x, trial.x], -1))
    trial.defined(trial.call(layer, trial.x), trial.separate_bound)


@check("What one layer is given does not reach another.", after=DEFINED)
def layers_are_independent(trial: Trial) -> None:
    other, layer = trial.wrap(), trial.layer()
    trial.ask("load", other, Factors(-2 * trial.factors.a, trial.factors.b, trial.factors.bias))
    trial.defined(trial.call(layer, trial.x), trial.separate_bound)


@check(
    "Under autocast the layer computes the same, but for the rounding to the narrow dtype.",
    after=DEFINED,
    draws={"dtype": st.just("fp32")},
)
def autocast_only_rounds(trial: Trial) -> None:
    layer = trial.layer()
    with torch.autocast("cpu", torch.bfloat16):
        y = trial.call(layer, trial.x)
    narrow = bounds.Arithmetic.of(torch.bfloat16)
    arithmetic = replace(narrow, operand=narrow.unit)  # inputs and parameters are rounded too
    allowed = bounds.separate(*trial.terms, arithmetic)
    if trial.terms.bias is not None:
        allowed = allowed + narrow.unit * trial.terms.bias.double().abs()
    trial.near("y", y, definition.forward(*trial.terms), allowed)


@check(
    "Dropout acts on the adapter's input alone, and in training alone.",
    after=DEFINED,
    draws={"dtype": WIDE},
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
    allowed = bounds.either(*trial.terms, trial.arithmetic)
    trial.defined(trial.call(layer, trial.x), allowed)
    wanted = definition.forward(*trial.terms)
    differs = any(bool(((y.double() - wanted).abs() > allowed).any()) for y in in_training)
    trial.require(differs, "with a dropout of 0.5 four outputs in training are those of evaluation")
