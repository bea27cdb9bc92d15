"""What the third parties are given: a small case of each kind of layer."""

from __future__ import annotations

from typing import Any

from lora_bench.case import Case
from lora_bench.conformance.trial import Trial
from tests.shipped_subjects import subject_here

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")


def trial(name: str, kind: str = "linear", **fields: Any) -> Trial:
    """A small case of that kind, scaled by other than 1 where the subject can."""
    subject = subject_here(name)
    shape = {"kernel": 2, "stride": 2, "padding": 1} if kind in CONVOLUTIONS else {}
    case = Case(kind=kind, bias=kind != "embedding", **(shape | fields))
    if subject.supports(case.spec) is not None:
        case = Case(kind=kind, bias=kind != "embedding", alpha=float(case.rank), **(shape | fields))
    return Trial(subject, case)
