"""What makes no sense: refused, or of an effect that anybody would expect; never passed over in silence."""

from __future__ import annotations

import math
import warnings
from contextlib import contextmanager, suppress
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from lora_bench.conformance.check import check
from lora_bench.conformance.outcome import Fails, NotOffered, Raised
from lora_bench.conformance.state import state_of
from lora_bench.conformance.training import trained
from lora_bench.spec import Factors, LoraSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_bench.conformance.trial import Trial
    from lora_bench.subject import Layer

DEFINED = "forward.matches_definition"


@check("A rank below 1 is refused, when first used at the latest; a rank of 0 may also mean no adapter.", after=DEFINED)
def rank_below_one_is_refused(trial: Trial) -> None:
    if (layer := taken(trial, rank=0)) is not None and works(trial, layer):
        trial.bare(trial.call(layer, trial.x))
        found = trained(trial, layer)
        trial.require(found == 0, f"with a rank of 0 {found} numbers train")
    layer = taken(trial, rank=-1)
    trial.require(layer is None or not works(trial, layer), "a rank of -1 was taken")


@check("An alpha that is no finite number is refused, or makes the output no number.", after=DEFINED)
def alpha_that_is_no_number_shows(trial: Trial) -> None:
    for alpha in (math.nan, math.inf):
        layer = taken(trial, alpha=alpha)
        if layer is None:
            continue
        trial.ask("load", layer, trial.factors)
        finite = bool(trial.call(layer, trial.x).isfinite().any())
        trial.require(not finite, f"with an alpha of {alpha} the output is a number")


@check("An alpha of 0 is refused, or the output is that of the base.", after=DEFINED)
def alpha_of_zero_is_base(trial: Trial) -> None:
    if (layer := taken(trial, alpha=0.0)) is not None:
        trial.ask("load", layer, trial.factors)
        trial.bare(trial.call(layer, trial.x))


@check("A negative alpha is refused, or the adapter's output is subtracted.", after=DEFINED)
def negative_alpha_subtracts(trial: Trial) -> None:
    if (layer := taken(trial, alpha=-trial.spec.alpha)) is not None:
        flipped = Factors(trial.factors.a, -trial.factors.b)
        trial.ask("load", layer, flipped)
        trial.defined(trial.call(layer, trial.x), trial.separate_bound)


@check("A dropout above 1 is refused, when first used at the latest.", after=DEFINED)
def dropout_above_one_is_refused(trial: Trial) -> None:
    layer = taken(trial, dropout=1.5)
    trial.require(layer is None or not works(trial, layer), "a dropout of 1.5 was taken")


@check("A NaN or an infinity in A or B is refused, or reaches the output.", after=DEFINED)
def factors_that_are_no_numbers_show(trial: Trial) -> None:
    for name in ("a", "b"):
        for value in (math.nan, math.inf):
            factors = trial.factors
            getattr(factors, name)[-1, -1] = value
            layer = trial.wrap()
            try:
                trial.ask("load", layer, factors)
            except Raised:
                continue
            y = trial.call(layer, trial.x)
            reached = y[:, -1] if name == "b" else y
            trial.require(not reached.isfinite().any(), f"a {value} in {name.upper()} does not reach the output")


@check(
    "A state of which no name is known is refused, with an error or a warning.",
    needs=("state", "load_state"),
    after="state.survives_saving",
)
def foreign_state_is_refused(trial: Trial) -> None:
    foreign = {f"foreign.{name}": value.clone() for name, value in state_of(trial, trial.layer()).items()}
    layer = trial.wrap()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            trial.ask("load_state", layer, foreign)
        except Raised:
            return
    trial.require(bool(said), f"a state of {', '.join(foreign)} was loaded, and nothing was said")


@contextmanager
def refused(otherwise: str) -> Iterator[None]:
    """Fail, as it says, unless the subject refuses what is asked of it inside."""
    try:
        yield
    except Raised:
        return
    raise Fails(otherwise)


def works(trial: Trial, layer: Layer) -> bool:
    """Whether it can be called in training."""
    with suppress(NotOffered):  # it is no module, and has no mode
        trial.train(layer, True)
    try:
        trial.call(layer, trial.x)
    except Raised:
        return False
    return True


def taken(trial: Trial, **values: Any) -> Layer | None:
    """The layer that `wrap` makes of a spec with values that `LoraSpec` itself refuses, or None where it refuses."""
    spec = object.__new__(LoraSpec)
    for field in fields(LoraSpec):
        object.__setattr__(spec, field.name, values.get(field.name, getattr(trial.spec, field.name)))
    try:
        return trial.wrap(spec)
    except (NotOffered, Fails):  # it raised, or returned no layer
        return None
