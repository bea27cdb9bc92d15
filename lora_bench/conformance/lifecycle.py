"""Verbs in any order: most bugs that shipped are sequences of calls that nobody tried."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from hypothesis import strategies as st

from lora_bench import bounds, definition
from lora_bench.case import OPS
from lora_bench.conformance.adapters import OWN
from lora_bench.conformance.check import check
from lora_bench.conformance.merge import strayed
from lora_bench.conformance.outcome import Raised, blaming
from lora_bench.conformance.state import reloaded
from lora_bench.spec import Factors

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from lora_bench.conformance.adapters import Adapter
    from lora_bench.conformance.trial import Trial
    from lora_bench.subject import Layer

NEEDED = {
    "load": ("load",),
    "merge": ("merge",),
    "unmerge": ("unmerge",),
    "on": ("enable",),
    "off": ("enable",),
    "reload": ("state", "load_state"),
    "switch": ("add", "activate"),
    "back": ("add", "activate"),
}
"""The verbs that an operation is made of; without them it is passed over."""


def sequence(seed: int) -> tuple[str, ...]:
    """Ten operations, any as likely as any other; Hypothesis' own lists repeat themselves too much to meet an order."""
    return tuple(random.Random(seed).choices(OPS, k=10))


@dataclass
class Model:
    """What a layer should be by now, after any verbs: the model that its outputs are compared with.

    `slack` is how far W may have strayed by merging and unmerging. While `merged`, what was loaded may or may not show
    (`stale`), and whether `off` gives the base is the implementation's choice: both are settled by `unmerge`.
    """

    layer: Layer
    own: Adapter
    other: Adapter
    slack: Tensor
    active: str = "own"
    enabled: bool = True
    merged: bool = False
    stale: bool = False
    done: list[str] = field(default_factory=list)

    @property
    def acting(self) -> Adapter:
        return self.own if self.active == "own" else self.other


@check(
    "Whatever the order of load, merge, unmerge, on, off, train, eval, save, copy and switch, the output is the "
    "definition's, and what is refused changes nothing.",
    after="forward.matches_definition",
    draws={
        "ops": st.integers(0, 2**32).map(sequence),
        "adapters": st.just(2),
        "tokens": st.integers(1, 2),
        "d_in": st.integers(1, 3),
        "d_out": st.integers(1, 3),
        "gain": st.just(1.0),
    },
    effort=4,
)
def any_order(trial: Trial) -> None:
    own, other = trial.adapters
    model = Model(trial.layer(), own, other, torch.zeros_like(trial.terms.weight, dtype=torch.float64))
    if trial.subject.offers("add", "activate"):
        trial.must_support(other[0])
        trial.ask("add", model.layer, "other", *other)
    for op in trial.case.ops:
        if not trial.subject.offers(*NEEDED.get(op, ())):
            continue
        model.done.append(op)
        try:
            STEPS[op](trial, model)
        except Raised:
            model.done[-1] = f"{op} (refused)"
        judge(trial, model)


def judge(trial: Trial, model: Model) -> None:
    """Fail unless the output is what the model says, where it says anything."""
    if model.merged and (model.stale or not model.enabled):
        return
    spec, factors = model.acting
    terms = trial.terms_of(factors, spec.scaling if model.enabled else 0.0)
    allowed = strayed(trial, terms, model.slack, bounds.either)
    y = trial.call(model.layer, trial.x)
    trial.near(f"y after {', '.join(model.done)}: y", y, definition.forward(*terms), allowed)


def _load(trial: Trial, model: Model) -> None:
    spec, factors = model.own
    others = Factors(-2 * factors.a, factors.b)
    trial.ask("load", model.layer, others.map(torch.clone))
    model.own, model.stale = (spec, others), model.merged


def _merge(trial: Trial, model: Model) -> None:
    merged = trial.merge(model.layer)
    if merged is not model.layer:  # a copy, or an export: the layer stays as it was
        return
    if not model.merged:
        spec, factors = model.acting
        reached = trial.terms.weight.double().abs() + model.slack
        model.slack = model.slack + bounds.unmerged_weight(reached, factors, spec.scaling, trial.arithmetic)
    model.merged = True


def _unmerge(trial: Trial, model: Model) -> None:
    trial.ask("unmerge", model.layer)
    model.merged = model.stale = False


def _on(trial: Trial, model: Model) -> None:
    trial.ask("enable", model.layer, True)
    model.enabled = True


def _off(trial: Trial, model: Model) -> None:
    trial.ask("enable", model.layer, False)
    model.enabled = False


def _train(trial: Trial, model: Model) -> None:
    trial.train(model.layer, True)


def _eval(trial: Trial, model: Model) -> None:
    trial.train(model.layer, False)


def _copy(_trial: Trial, model: Model) -> None:
    with blaming("copy.deepcopy"):
        model.layer = copy.deepcopy(model.layer)


def _reload(trial: Trial, model: Model) -> None:
    if model.active != "own":  # whose state it would be is the implementation's choice
        return
    layer = reloaded(trial, model.layer)
    if trial.subject.offers("add", "activate"):
        trial.ask("add", layer, "other", *model.other)
    model.layer, model.slack = layer, torch.zeros_like(model.slack)
    model.enabled, model.merged, model.stale = True, False, False


def _switch(trial: Trial, model: Model) -> None:
    trial.ask("activate", model.layer, ["other"])
    model.active, model.merged, model.stale = "other", False, False


def _back(trial: Trial, model: Model) -> None:
    trial.ask("activate", model.layer, [OWN])
    model.active, model.merged, model.stale = "own", False, False


STEPS: dict[str, Callable[[Trial, Model], None]] = {
    "load": _load,
    "merge": _merge,
    "unmerge": _unmerge,
    "on": _on,
    "off": _off,
    "train": _train,
    "eval": _eval,
    "copy": _copy,
    "reload": _reload,
    "switch": _switch,
    "back": _back,
}
