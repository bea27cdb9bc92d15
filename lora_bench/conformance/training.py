"""What trains, and by which gradients."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from hypothesis import strategies as st
from torch.autograd.gradcheck import GradcheckError
from torch.utils.checkpoint import checkpoint

from lora_bench import bounds, definition
from lora_bench.conformance import kinds
from lora_bench.conformance.check import ANY_BASE, DENSE, WIDE, check
from lora_bench.conformance.outcome import Fails, blaming
from lora_bench.spec import Factors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_bench.conformance.trial import Trial
    from lora_bench.subject import Layer


@check("A and B require a gradient, and nothing else does.", bases=ANY_BASE)
def only_factors_train(trial: Trial) -> None:
    judge_trained(trial, trial.wrap(), sizes(trial))


def judge_trained(trial: Trial, layer: Layer, wanted: Mapping[str, int]) -> None:
    """Fail unless parameters of these sizes require a gradient, and nothing else does."""
    trainable = trial.trainable(layer)
    found = sorted(parameter.numel() for parameter in trainable.values())
    listed = ", ".join(f"{name} {tuple(parameter.shape)}" for name, parameter in trainable.items()) or "nothing"
    named = " and ".join(f"{name} of {size}" for name, size in wanted.items())
    trial.require(found == sorted(wanted.values()), f"what trains is {listed}; wanted {named} numbers")


def trained(trial: Trial, layer: Layer) -> int:
    """How many numbers of a layer, or of a model, train."""
    return sum(parameter.numel() for parameter in trial.trainable(layer).values())


def sizes(trial: Trial) -> dict[str, int]:
    """How many numbers A and B hold: r fan_in and d_out r, where B mixes no groups of a convolution."""
    return {"A": trial.factors.a.numel(), "B": trial.factors.b.numel() // trial.case.groups}


@check("An adapter trains r (d_in + d_out) numbers.", after="training.only_factors_train", bases=DENSE)
def parameter_count(trial: Trial) -> None:
    found, wanted = trained(trial, trial.wrap()), sum(sizes(trial).values())
    trial.near("trainable parameters", torch.tensor(found), torch.tensor(wanted))


@check(
    "The gradients of A, B and x are those of the formulas.",
    needs=("factors",),
    after="forward.matches_definition",
    bases=DENSE,
)
def gradients_match_formulas(trial: Trial) -> None:
    judge_gradients(trial, trial.layer())


def judge_gradients(trial: Trial, layer: Layer) -> None:
    """Fail unless dL/dA, dL/dB and dL/dx are those of the formulas."""
    x = trial.x
    if x.is_floating_point():
        x.requires_grad_()
    trial.backward(trial.call(layer, x), trial.grad)
    live = trial.factors_of(layer)
    wanted, allowed = gradients(trial, trial.factors)
    for name in ("a", "b"):
        gradient = trial.gradient_of(name, getattr(live, name))
        trial.near(f"grad of {name}", gradient, getattr(wanted, name), getattr(allowed, name))
    if x.is_floating_point():
        place = partial(kinds.folded, trial.case, trial.x)
        trial.near("grad of x", trial.tensor_of("the gradient of x", x.grad), place(wanted.x), place(allowed.x))
    trial.visible(wanted.a, allowed.a)
    trial.visible(wanted.b, allowed.b)


def gradients(trial: Trial, factors: Factors) -> tuple[definition.Gradients, definition.Gradients]:
    """What the gradients are, of x as rows, and how far they may stray."""
    x, weight, _, _, scaling = trial.terms
    terms = (x, kinds.outputs(trial.case, trial.grad), weight, factors, scaling)
    return definition.gradients(*terms), bounds.gradients(*terms, trial.arithmetic, overlap=overlap(trial))


def overlap(trial: Trial) -> int:
    """Of how many rows a number of x is part, at most."""
    if not trial.x.is_floating_point():
        return 1
    rows = kinds.rows(trial.case, trial.x)
    return int(kinds.folded(trial.case, trial.x, torch.ones_like(rows).double()).max())


@check(
    "The gradients of A, B and x are the slopes of the output.",
    after="training.gradients_match_formulas",
    draws={
        "dtype": st.just("fp64"),
        "tokens": st.integers(1, 2),
        "d_in": st.integers(1, 4),
        "d_out": st.integers(1, 4),
        "rank": st.integers(1, 3),
    },
)
def gradcheck(trial: Trial) -> None:
    layer = trial.layer()
    x, weight, bias, factors, scaling = trial.terms
    # The output is linear in each number of x, A and B alone, so that a step of 1 truncates nothing and the slope
    # errs by the output's own rounding at the far ends of the steps.
    step = 1.0
    ends = Factors(factors.a.abs() + step, factors.b.abs() + step)
    far = bounds.separate(x.abs() + step, weight, bias, ends, scaling, trial.arithmetic)
    analytic = bounds.gradients(x, torch.ones_like(trial.grad), weight, factors, scaling, trial.arithmetic)
    allowed = far.max() / step + max(bound.max() for bound in analytic)

    leaves = [trial.x.requires_grad_(), *trial.trainable(layer).values()]
    with blaming("backward"):
        try:
            torch.autograd.gradcheck(
                lambda x, *_: trial.call(layer, x), leaves, eps=step, atol=float(allowed), rtol=0.0
            )
        except GradcheckError as mismatch:
            raise Fails(str(mismatch).strip()) from None


@check(
    "Optimiser steps move A and B and leave the base as it was, bit for bit.",
    needs=("weight",),
    after="training.only_factors_train",
    bases=DENSE,
    draws={"dtype": WIDE},
)
def base_is_untouched_by_a_step(trial: Trial) -> None:
    judge_steps(trial, trial.layer())


def judge_steps(trial: Trial, layer: Layer) -> None:
    """Fail unless AdamW over every parameter of the layer moves what trains, and neither weight nor bias."""
    parameters = trial.parameters(layer)
    # The factors are matrices: whatever is a vector is of the base.
    vectors = {name: parameter.detach().clone() for name, parameter in parameters.items() if parameter.ndim == 1}
    before = {name: parameter.detach().clone() for name, parameter in trial.trainable(layer).items()}
    weight = trial.weight_of(layer)
    optimiser = torch.optim.AdamW(parameters.values(), lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        trial.backward(trial.call(layer, trial.x), trial.grad)
        optimiser.step()
    trial.near("the base's weight", trial.weight_of(layer), weight)
    for name, vector in vectors.items():
        trial.near(name, parameters[name], vector)
    still = [name for name, value in before.items() if torch.equal(value, parameters[name])]
    trial.require(bool(before) and not still, f"a step does not move {', '.join(still) or 'anything'}")


@check(
    "Gradient checkpointing changes the gradients by rounding alone.",
    needs=("factors",),
    after="training.gradients_match_formulas",
)
def checkpointing_changes_nothing(trial: Trial) -> None:
    layer = trial.layer()
    x = trial.x.requires_grad_()
    with blaming("forward"):
        y = checkpoint(layer, x, use_reentrant=False)
    trial.backward(trial.tensor_of("the output", y), trial.grad)
    live = trial.factors_of(layer)
    wanted, allowed = gradients(trial, trial.factors)
    trial.near("grad of a", trial.gradient_of("a", live.a), wanted.a, allowed.a)
    trial.near("grad of b", trial.gradient_of("b", live.b), wanted.b, allowed.b)
    trial.near("grad of x", trial.tensor_of("the gradient of x", x.grad), wanted.x, allowed.x)


@check(
    "While B is zero A gets no gradient and B does.",
    needs=("factors",),
    after="training.gradients_match_formulas",
    bases=tuple(kind for kind in DENSE if kind != "embedding"),
)
def gradient_at_zero_b(trial: Trial) -> None:
    layer = trial.wrap()
    live = trial.factors_of(layer)
    a, b = live.a.detach().double(), torch.zeros_like(live.b).double()
    trial.backward(trial.call(layer, trial.x), trial.grad)
    wanted, allowed = gradients(trial, Factors(a, b))
    trial.near("grad of a", trial.gradient_of("a", live.a), wanted.a, allowed.a)
    trial.near("grad of b", trial.gradient_of("b", live.b), wanted.b, allowed.b)
    trial.visible(wanted.b, allowed.b)
