"""What an adapter keeps, and what becomes of a copy."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from lora_bench import bounds, definition
from lora_bench.conformance.check import DENSE, check
from lora_bench.conformance.outcome import NotOffered, Raised, blaming
from lora_bench.conformance.training import judge_gradients
from lora_bench.spec import Factors

if TYPE_CHECKING:
    from lora_bench.conformance.trial import Trial
    from lora_bench.subject import Layer

DEFINED = "forward.matches_definition"
EXACT = {
    "dtype": st.just("fp32"),
    "rank": st.just(2),
    "alpha": st.sampled_from([2.0, 8.0, 32.0]),
    "rslora": st.just(False),
}
"""Scalings that multiply, and whose roots multiply, without rounding, wherever they are folded in."""


@check("The adapter's state is A and B, as they are, and nothing else.", needs=("state",))
def has_exactly_a_and_b(trial: Trial) -> None:
    state = state_of(trial, trial.layer())
    listed = ", ".join(f"{name} {tuple(value.shape)}" for name, value in state.items()) or "nothing"
    left = list(state.values())
    for name, factor in (("A", trial.factors.a), ("B", trial.factors.b)):
        here = [value for value in left if _same(value, factor)]
        trial.require(bool(here), f"{name} {tuple(factor.shape)} is not in the state, which holds {listed}")
        left = [value for value in left if value is not here[0]]
    trial.require(not left, f"the state holds more than A and B: {listed}")


def state_of(trial: Trial, layer: Layer) -> dict[str, Tensor]:
    """What `state` gives, which must be tensors by name."""
    state = trial.ask("state", layer)
    trial.require(isinstance(state, dict), f"the state is a {type(state).__name__}, not a dict")
    return {name: trial.tensor_of(name, value) for name, value in state.items()}


def _same(value: Tensor, factor: Tensor) -> bool:
    """Whether these are the factor's numbers, in either orientation."""
    return any(torch.equal(value.double(), way.double()) for way in (factor, factor.T))


@check(
    "An adapter that was saved and loaded into a fresh layer computes the same.",
    needs=("state", "load_state"),
    after=DEFINED,
    bases=DENSE,
)
def survives_saving(trial: Trial) -> None:
    trial.defined(trial.call(reloaded(trial, trial.layer()), trial.x), trial.separate_bound)


@check(
    "An adapter that was saved and loaded trains on: A, B and x get their gradients.",
    needs=("state", "load_state", "factors"),
    after="state.survives_saving",
)
def trains_after_loading(trial: Trial) -> None:
    judge_gradients(trial, reloaded(trial, trial.layer()))


def reloaded(trial: Trial, layer: Layer) -> Layer:
    """A fresh layer with the adapter of another, saved and loaded."""
    kept, fresh = saved(trial, layer), trial.wrap()
    trial.ask("load_state", fresh, kept)
    return fresh


def saved(trial: Trial, layer: Layer) -> dict[str, Tensor]:
    """The state of a layer as a safetensors file keeps it."""
    kept = {name: value.detach().clone().contiguous() for name, value in state_of(trial, layer).items()}
    return load(save(kept))


@check("A deep copy computes the same, and has factors of its own.", after=DEFINED, bases=DENSE)
def survives_deepcopy(trial: Trial) -> None:
    layer = trial.layer()
    with blaming("copy.deepcopy"):
        twin = copy.deepcopy(layer)
    trial.ask("load", layer, Factors(-trial.factors.a, trial.factors.b))
    trial.defined(trial.call(twin, trial.x), trial.separate_bound)


@check("A layer that can be pickled computes the same afterwards.", after=DEFINED)
def survives_pickling(trial: Trial) -> None:
    layer = trial.layer()
    try:
        with blaming("pickle.dumps"):
            pickled = pickle.dumps(layer)
    except Raised as refused:  # as torch does for parametrised modules
        raise NotOffered(refused.because) from None
    with blaming("pickle.loads"):
        twin = pickle.loads(pickled)  # noqa: S301  # made on the line above
    trial.defined(trial.call(twin, trial.x), trial.separate_bound)


@check("Moved to float64, the layer computes in float64.", after=DEFINED, draws=EXACT)
def survives_a_change_of_dtype(trial: Trial) -> None:
    if "fp64" not in trial.subject.dtypes:
        raise NotOffered("no fp64")
    module = trial.module(trial.layer())
    with blaming("to"):
        wide = module.to(torch.float64)
    y = trial.call(wide, trial.x.double())
    trial.require(y.dtype == torch.float64, f"y is {y.dtype}, wanted torch.float64")
    # Every number of the case is one of float32, so that nothing was lost on the way.
    arithmetic = replace(bounds.Arithmetic.of(torch.float64), underflow=trial.arithmetic.underflow)
    trial.near("y", y, definition.forward(*trial.terms), bounds.separate(*trial.terms, arithmetic))


@check("train() and eval() return the layer, as they do of every torch module.")
def modes_return_the_layer(trial: Trial) -> None:
    module = trial.module(trial.layer())
    for name in ("eval", "train"):
        with blaming(name):
            returned = getattr(module, name)()
        trial.require(returned is module, f"{name}() returned {type(returned).__name__}, wanted the layer itself")
