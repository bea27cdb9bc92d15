"""Several adapters on one layer: added, switched, active together, merged in part, combined and deleted."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import torch
from hypothesis import strategies as st

from lora_bench import bounds, definition
from lora_bench.conformance.check import WIDE, check
from lora_bench.conformance.merge import strayed
from lora_bench.conformance.misuse import refused
from lora_bench.conformance.outcome import Raised
from lora_bench.conformance.training import trained
from lora_bench.conformance.trial import Terms
from lora_bench.spec import Factors, LoraSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from lora_bench.conformance.trial import Trial
    from lora_bench.subject import Layer

OWN = "default"
NEEDS = ("add", "activate")
DEFINED = "forward.matches_definition"
SWITCHED = "adapters.switching_switches"
SEVERAL = {"adapters": st.integers(2, 3)}
claim = partial(check, needs=NEEDS, after=SWITCHED, draws=SEVERAL)
combining = partial(claim, needs=(*NEEDS, "combine"))

Adapter = tuple[LoraSpec, Factors]


@check("An adapter that was added and not activated does nothing.", needs=NEEDS, after=DEFINED, draws=SEVERAL)
def inactive_ones_do_nothing(trial: Trial) -> None:
    layer, _ = several(trial)
    trial.defined(trial.call(layer, trial.x), trial.separate_bound)


@check("After a switch the new adapter acts alone, and after switching back the old one.", needs=NEEDS, draws=SEVERAL)
def switching_switches(trial: Trial) -> None:
    layer, adapters = several(trial)
    for name in (*reversed(adapters), OWN):
        trial.ask("activate", layer, [name])
        judge(trial, trial.call(layer, trial.x), [adapters[name]])


@claim("What several active adapters add to the output adds up.")
def active_ones_add_up(trial: Trial) -> None:
    layer, adapters = several(trial)
    trial.ask("activate", layer, list(adapters))
    judge(trial, trial.call(layer, trial.x), adapters.values())


@claim("What is active trains, and nothing else.")
def active_ones_train(trial: Trial) -> None:
    layer, adapters = several(trial)
    for names in ([name for name in adapters if name != OWN], [OWN]):
        trial.ask("activate", layer, names)
        found = trained(trial, layer)
        wanted = sum(adapters[name][0].parameters(trial.case.d_in, trial.case.d_out) for name in names)
        trial.require(found == wanted, f"with {', '.join(names)} active {found} numbers train, wanted {wanted}")


@claim("Deleting an adapter leaves the others, and it cannot be activated again.", needs=(*NEEDS, "delete"))
def deleted_ones_are_gone(trial: Trial) -> None:
    layer, adapters = several(trial)
    gone = list(adapters)[-1]
    trial.ask("delete", layer, gone)
    trial.defined(trial.call(layer, trial.x), trial.separate_bound)
    with refused(f"{gone!r} was activated after it had been deleted"):
        trial.ask("activate", layer, [gone])
    trial.defined(trial.call(layer, trial.x), trial.separate_bound)


@claim(
    "Merging some of the active adapters leaves the output, and unmerging restores it.",
    needs=(*NEEDS, "merge_adapters", "unmerge"),
    after="adapters.active_ones_add_up",
)
def partial_merge_keeps_the_others(trial: Trial) -> None:
    for name in (OWN, "other0"):
        layer, adapters = several(trial)
        trial.ask("activate", layer, list(adapters))
        merged = trial.ask("merge_adapters", layer, [name])
        rest = stacked(trial, [adapter for other, adapter in adapters.items() if other != name])
        terms = (rest.weight, *parts([adapters[name]]))
        weight, slack = definition.merged_weight(*terms), bounds.merged_weight(*terms, trial.arithmetic)
        together = stacked(trial, adapters.values())
        wanted, bound = definition.forward(*together), partial(bounds.separate, sums=len(adapters))
        y = trial.call(layer if merged is None else merged, trial.x)
        asked = trial.asked._replace(adapters=list(adapters.values()), acting=(1.0,) * len(adapters))
        trial.near("y", y, wanted, strayed(trial, rest._replace(weight=weight), slack, bound), of=asked)
        trial.ask("unmerge", layer)
        slack = bounds.unmerged_weight(*terms, trial.arithmetic)
        trial.near("y", trial.call(layer, trial.x), wanted, strayed(trial, together, slack, bound), of=asked)


@combining("Adapters combined by concatenation add the weighted sum of what they add alone.")
def cat_is_the_weighted_sum(trial: Trial) -> None:
    judge_combined(trial, "cat")


@combining("A linear combination of one adapter adds as many times what it adds alone as it weighs.")
def linear_of_one_is_weighted(trial: Trial) -> None:
    # Of several with one rank between them it is no sum: B and A of different adapters meet in (ΣB)(ΣA).
    judge_combined(trial, "linear")


@combining(
    "Adapters combined by a decomposition of enough rank add the weighted sum of what they add alone.",
    draws=SEVERAL | {"dtype": WIDE},
)
def svd_is_the_weighted_sum(trial: Trial) -> None:
    judge_combined(trial, "svd")


@check("To activate an adapter that is not there is refused, and changes nothing.", needs=NEEDS, after=DEFINED)
def unknown_name_is_refused(trial: Trial) -> None:
    layer = trial.layer()
    with refused("'nobody' was activated, and there is no such adapter"):
        trial.ask("activate", layer, ["nobody"])
    trial.defined(trial.call(layer, trial.x), trial.separate_bound)


@check("To add an adapter whose factors do not fit is refused, and changes nothing.", needs=NEEDS, after=DEFINED)
def wrong_shapes_are_refused(trial: Trial) -> None:
    layer, factors = trial.layer(), trial.factors
    wide = Factors(torch.cat([factors.a, factors.a], 1), factors.b)
    with refused(f"factors of a layer with d_in {wide.d_in} were added to one with {trial.case.d_in}"):
        trial.ask("add", layer, "wide", trial.spec, wide)
    trial.defined(trial.call(layer, trial.x), trial.separate_bound)
    with suppress(Raised):  # what was refused has left nothing behind under its name
        trial.ask("activate", layer, ["wide"])
        trial.ask("activate", layer, [OWN])
    trial.defined(trial.call(layer, trial.x), trial.separate_bound)


def several(trial: Trial) -> tuple[Layer, dict[str, Adapter]]:
    """A layer with its own adapter and the case's others beside it, all by name."""
    own, *others = trial.adapters
    adapters = {OWN: own} | {f"other{index}": adapter for index, adapter in enumerate(others)}
    layer = trial.layer()
    for name, (spec, factors) in adapters.items():
        trial.must_support(spec)
        if name != OWN:
            trial.ask("add", layer, name, spec, factors.map(torch.clone))
    return layer, adapters


def parts(adapters: Iterable[Adapter], weights: Sequence[float] = ()) -> tuple[Factors, float]:
    """Several adapters as one, A over A and B beside B, with the largest of their scalings."""
    adapters = list(adapters)
    ones = [1.0] * len(adapters)
    scalings = [spec.scaling * weight for (spec, _), weight in zip(adapters, weights or ones, strict=True)]
    largest = max(map(abs, scalings))
    a = torch.cat([factors.a.double() for _, factors in adapters])
    b = [factors.b.double() * (scaling / largest) for (_, factors), scaling in zip(adapters, scalings, strict=True)]
    return Factors(a, torch.cat(b, 1)), largest


def stacked(trial: Trial, adapters: Iterable[Adapter], weights: Sequence[float] = ()) -> Terms:
    """The terms of several adapters that act together."""
    return trial.terms_of(*parts(adapters, weights))


def judge(trial: Trial, y: Tensor, adapters: Iterable[Adapter]) -> None:
    """Fail unless y is the base's output and what each of the adapters adds, each of which could be missed."""
    adapters = list(adapters)
    terms = stacked(trial, adapters)
    allowed = bounds.separate(*terms, trial.arithmetic, sums=len(adapters))
    asked = trial.asked._replace(adapters=adapters, acting=(1.0,) * len(adapters))
    trial.near("y", y, definition.forward(*terms), allowed, of=asked)
    for spec, factors in adapters:
        trial.visible(definition.delta(terms.x, factors, spec.scaling), allowed)


def judge_combined(trial: Trial, how: str) -> None:
    """Fail unless the combination's output is the base's and the weighted sum of what its parts add."""
    layer, adapters = several(trial)
    if how == "linear":
        adapters = {"other0": adapters["other0"]}
    weights: Mapping[str, float] = {name: 1.5 + index for index, name in enumerate(adapters)}
    trial.ask("combine", layer, "combined", dict(weights), how)
    trial.ask("activate", layer, ["combined"])
    terms = stacked(trial, adapters.values(), list(weights.values()))
    # Each factor was multiplied by its weight and stored.
    allowed = bounds.separate(*terms, trial.arithmetic, sums=3)
    if how == "svd":
        delta = terms.scaling * terms.factors.b @ terms.factors.a
        allowed = allowed + terms.x.double().abs() @ bounds.decomposed(delta, trial.arithmetic).T
    asked = trial.asked._replace(adapters=list(adapters.values()), acting=tuple(weights.values()))
    trial.near("y", trial.call(layer, trial.x), definition.forward(*terms), allowed, of=asked)
    for name, (spec, factors) in adapters.items():
        trial.visible(definition.delta(terms.x, factors, spec.scaling * weights[name]), allowed)
