"""Arms of the micro model put to the proof, and how a bug is planted in one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from lora_bench.bench import ready
from lora_bench.bench.arm import Arm, build_arm
from lora_bench.bench.result import Proof
from lora_bench.bench.workload import TARGETS, Row, Workload
from lora_bench.reference import REFERENCE, LoraLinear
from lora_bench.spec import LoraSpec
from lora_bench.subject import Subject

if TYPE_CHECKING:
    from torch import nn

LAYERS, ADAPTERS = 2 * len(TARGETS), 3
FIRST = "model.layers.0.self_attn.q_proj"
COMPUTING = ("prefill", "decode", "train")
"""The phases in which the adapters are used, and stay what they are."""


def row_of(setup: str, phase: str, dtype: str = "fp32") -> Row:
    adapters = ADAPTERS if setup == "batched" else 1
    return Row("planted", Workload(setup, phase, "micro", dtype, rank=4, batch=4, sequence=6, adapters=adapters))


@cache
def base_of(dtype: str) -> Any:
    return ready.build_base(row_of("separate", "prefill", dtype), "cpu")


def arm_of(subject: Subject, row: Row) -> Arm:
    base = base_of(row.workload.dtype)
    return build_arm(copy.deepcopy(base), subject, row.workload, pristine=base)


def proven(subject: Subject, setup: str, phase: str, dtype: str = "fp32") -> Proof:
    row = row_of(setup, phase, dtype)
    _, found = ready.ready_row(row, subject, arm_of(subject, row))
    assert found is not None
    return found


def wrapping(layer: Callable[[Any, LoraSpec], nn.Module], **verbs: Any) -> Subject:
    return replace(REFERENCE, name="planted", wrap=layer, **verbs)


def scaled(factor: float) -> Subject:
    return wrapping(lambda base, spec: LoraLinear(base, replace(spec, alpha=factor * spec.alpha)))
