"""How a layer begins, before any factors are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lora_bench.case import cases
from lora_bench.conformance.check import WIDE, check

if TYPE_CHECKING:
    from lora_bench.conformance.trial import Trial


@check("A fresh layer's output is that of its base.")
def is_identity(trial: Trial) -> None:
    trial.bare(trial.call(trial.wrap(), trial.x))


@check(
    "A fresh layer's B is zero and its A is random.",
    needs=("factors",),
    cases=cases(dtype=WIDE),  # two draws of a small A may well agree in 16 bits
)
def a_is_random_b_is_zero(trial: Trial) -> None:
    factors, others = trial.factors_of(trial.wrap()), trial.factors_of(trial.wrap())
    trial.near("B", factors.b, torch.zeros_like(factors.b))
    trial.require(bool(factors.a.isfinite().all()), "A is not finite")
    trial.require(not torch.equal(factors.a, others.a), "two fresh layers have the same A")
