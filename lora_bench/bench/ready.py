"""Rows made ready: built, proven and run once; and why one was refused."""

from __future__ import annotations

import copy
import gc
from typing import TYPE_CHECKING

import torch

from lora_bench import subjects
from lora_bench.bench.arm import build_arm, make_step, torch_dtype
from lora_bench.bench.isolate import failure_kind
from lora_bench.bench.proof import Unproven, Wrong, prove, prove_switched, prove_training
from lora_bench.bench.workload import BASE
from lora_bench.models.build import build as build_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lora_bench.bench.arm import Arm, Step
    from lora_bench.bench.result import Proof
    from lora_bench.bench.workload import Row
    from lora_bench.subject import Subject


def build_base(row: Row, device: str) -> PreTrainedModel:
    """The unadapted model of a row's workload; the same weights each time on the same device."""
    return build_model(row.workload.model, dtype=torch_dtype(row.workload.dtype), device=device)


def build(base: PreTrainedModel, row: Row) -> tuple[Subject | None, Arm]:
    """The row's subject and its arm on a copy of `base`; the base's own arm is `base` itself."""
    if row.subject == BASE:
        return None, build_arm(base, None, row.workload)
    subject = subjects.find(row.subject)
    return subject, build_arm(copy.deepcopy(base), subject, row.workload, pristine=base)


def build_alone(row: Row, device: str, pristine: PreTrainedModel | None = None) -> tuple[Subject | None, Arm]:
    """The row's subject and its arm on a model of its own; `pristine`, which may be elsewhere, to judge it by."""
    subject = None if row.subject == BASE else subjects.find(row.subject)
    return subject, build_arm(build_base(row, device), subject, row.workload, pristine)


def ready_row(row: Row, subject: Subject | None, arm: Arm) -> tuple[Step, Proof | None]:
    """The row's step, run once, on an arm that has just been proven right."""
    training = row.workload.phase == "train"
    proof = prove_training(arm, subject) if training and subject is not None else None
    step = make_step(arm, row.workload)
    if row.workload.phase == "switch":
        return step, prove_switched(arm, row.workload)
    if subject is not None and not training:
        return step, prove(arm, step)
    # At its full size: a step that fails costs its own row here, and the whole comparison once all take turns.
    step.prepare()
    step.run()
    return step, proof


def refusal_kind(error: Exception) -> str:
    """Tell "wrong" (it does not compute LoRA) and "unproven" from what `failure_kind` tells apart."""
    if isinstance(error, Unproven):
        return "unproven"
    return "wrong" if isinstance(error, Wrong) else failure_kind(error)


def told(error: Exception, device: str) -> str:
    """An exception's type and text, and where the memory ran out, the peak that it had reached."""
    text = f"{type(error).__name__}: {error}"
    if failure_kind(error) == "oom" and device.startswith("cuda"):
        text += f" (peak reached: {torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB)"
    return text


def release(device: str) -> None:
    """Give back what is not used; raises where the device is out of order, which no other row in here survives."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.synchronize(device)
