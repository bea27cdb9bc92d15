"""What an adapter keeps, and what becomes of a copy."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_bench.conformance.check import check
from lora_bench.conformance.outcome import blaming
from lora_bench.spec import Factors

if TYPE_CHECKING:
    from lora_bench.conformance.trial import Trial


@check("The adapter's state is A and B, as they are, and nothing else.", needs=("state",))
def has_exactly_a_and_b(trial: Trial) -> None:
    state = trial.ask("state", trial.layer())
    trial.require(isinstance(state, dict), f"the state is a {type(state).__name__}, not a dict")
    listed = ", ".join(f"{name} {tuple(getattr(value, 'shape', ()))}" for name, value in state.items()) or "nothing"
    left = [trial.tensor_of(name, value) for name, value in state.items()]
    for name, factor in (("A", trial.factors.a), ("B", trial.factors.b)):
        here = [value for value in left if _same(value, factor)]
        trial.require(bool(here), f"{name} {tuple(factor.shape)} is not in the state, which holds {listed}")
        left = [value for value in left if value is not here[0]]
    trial.require(not left, f"the state holds more than A and B: {listed}")


def _same(value: Tensor, factor: Tensor) -> bool:
    """Whether these are the factor's numbers, in either orientation."""
    return any(torch.equal(value.double(), way.double()) for way in (factor, factor.T))


@check(
    "A deep copy computes the same, and has factors of its own.",
    after="forward.matches_definition",
)
def survives_deepcopy(trial: Trial) -> None:
    layer = trial.layer()
    with blaming("copy.deepcopy"):
        twin = copy.deepcopy(layer)
    others = Factors(-trial.factors.a, trial.factors.b)
    trial.ask("load", layer, others)
    trial.defined(trial.call(twin, trial.x), trial.separate_bound)
