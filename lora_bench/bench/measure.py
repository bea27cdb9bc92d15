"""The two jobs of a worker: time a comparison's rows side by side, and take one arm's peak memory."""

from __future__ import annotations

import copy
import gc
import os
import random
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lora_bench import subjects
from lora_bench.bench.arm import build_arm, make_step, torch_dtype
from lora_bench.bench.clock import clock_of
from lora_bench.bench.machine import fingerprint
from lora_bench.bench.memory import parameter_bytes, peak_memory
from lora_bench.bench.proof import Wrong, prove, prove_training, summary
from lora_bench.bench.workload import BASE
from lora_bench.models.build import build as build_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel

    from lora_bench.bench.arm import Arm, Step
    from lora_bench.bench.proof import Proof
    from lora_bench.bench.workload import Row
    from lora_bench.subject import Subject

WARM_UP_ROUNDS = 2
LEAST_ROUNDS, MOST_ROUNDS = 10, 200
ROUNDS_IN_PLACE = 2


class Progress(NamedTuple):
    """A line for whoever waits."""

    text: str


class Timing(NamedTuple):
    """One row's seconds in order of measurement, and the base's of the same rounds; `beside`: all that took turns."""

    row: Row
    seconds: list[float]
    base_seconds: list[float]
    proof: Proof | None
    beside: list[str]


class Refusal(NamedTuple):
    """A row that was not timed, and why: the build or the proof failed ("error", "wrong", "oom")."""

    row: Row
    kind: str
    text: str


def compare(
    rows: Sequence[Row], device: str, budget_seconds: float
) -> Iterator[Progress | Timing | Refusal | dict[str, Any]]:
    """Time `rows` (each phase's base among them) interleaved; yields the fingerprint, then each row's result.

    Every arm is built and proven first; rows whose arm fails are refused and the rest goes on. In each round every
    row of a phase runs once, in random order, so that what disturbs the machine disturbs all of them. Arms that do
    not fit the memory together are compared in groups, each with its own run of the base.
    """
    settle_threads(device)
    yield fingerprint(device)
    base = build_base(rows[0], device)
    for number, group in enumerate(groups_that_fit(rows, parameter_bytes(base), free_bytes(device))):
        if number and group[0].workload.phase == "train":
            base = build_base(group[0], device)  # the group before has trained the other
        yield from _compare_group(group, base, device, budget_seconds)
        _release(device)


def groups_that_fit(rows: Sequence[Row], weight_bytes: int, room: int) -> list[list[Row]]:
    """The rows in groups whose models take at most `room` bytes beside the base (or hold one arm each)."""
    arms = list(dict.fromkeys(row.arm for row in rows if row.subject != BASE))
    if rows[0].workload.phase == "train":
        room -= 3 * weight_bytes  # full fine-tuning: gradients and AdamW's two moments
    # An eighth for adapters, activations and cache.
    per_group = max(1, int(room / (weight_bytes * 1.125)))
    groups = []
    for start in range(0, len(arms) or 1, per_group):
        chosen = {(BASE, BASE), *arms[start : start + per_group]}
        groups.append([row for row in rows if row.arm in chosen])
    return groups


def settle_threads(device: str) -> None:
    """One thread on a CPU, unless OMP_NUM_THREADS says otherwise.

    Several wait for each other at every product: one that another process holds up for a moment stops them all.
    """
    if not device.startswith("cuda") and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def free_bytes(device: str) -> int:
    """Memory that a new tensor on the device may take now."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def _compare_group(
    rows: Sequence[Row], base: PreTrainedModel, device: str, budget_seconds: float
) -> Iterator[Progress | Timing | Refusal]:
    steps: dict[Row, Step] = {}
    proofs: dict[Row, Proof | None] = {}
    for arm_rows in _by_arm(rows):
        try:
            ready = _ready(base, arm_rows)
        except Exception as error:  # noqa: BLE001  # a subject may raise anything; its rows are refused by name
            yield from [Refusal(row, failure_kind(error), f"{type(error).__name__}: {error}") for row in arm_rows]
            _release(device)
            continue
        for row, (step, proof) in zip(arm_rows, ready, strict=True):
            steps[row], proofs[row] = step, proof
        if shown := [proof for row in arm_rows if (proof := proofs[row]) is not None]:
            checks, error_ratio, _ = summary(shown)
            name = " ".join(arm_rows[0].arm)
            yield Progress(f"{name} is right: {checks} checks, errors up to {error_ratio:.2f} of their bounds")
    for phase in dict.fromkeys(row.workload.phase for row in steps):
        chosen = {row: step for row, step in steps.items() if row.workload.phase == phase}
        yield Progress(f"timing {phase}: {len(chosen)} rows taking turns, about {budget_seconds:.0f} s")
        seconds = time_interleaved(chosen, device, budget_seconds)
        base_seconds = next((seconds[row] for row in seconds if row.subject == BASE), [])
        for row in seconds:
            yield Timing(row, seconds[row], base_seconds, proofs[row], [str(other) for other in seconds])


def failure_kind(error: BaseException) -> str:
    """Tell "wrong" (it does not compute LoRA) and "oom" (out of memory) from any other "error"."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return "oom"
    return "wrong" if isinstance(error, Wrong) else "error"


def _ready(base: PreTrainedModel, rows: Sequence[Row]) -> list[tuple[Step, Proof | None]]:
    built = build(base, rows[0])
    return [ready_row(row, *built) for row in rows]


def _release(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def _by_arm(rows: Sequence[Row]) -> list[list[Row]]:
    """The base last: it serves as the definition's weights until its own training changes them."""
    arms = sorted(dict.fromkeys(row.arm for row in rows), key=lambda arm: arm[0] == BASE)
    return [[row for row in rows if row.arm == arm] for arm in arms]


def build_base(row: Row, device: str) -> PreTrainedModel:
    """The unadapted model of a row's workload."""
    return build_model(row.workload.model, dtype=torch_dtype(row.workload.dtype), device=device)


def build(base: PreTrainedModel, row: Row) -> tuple[Subject | None, Arm]:
    """The row's subject and its arm on a copy of `base`; the base's own arm is `base` itself."""
    if row.subject == BASE:
        return None, build_arm(base, None, row.workload)
    subject = subjects.find(row.subject)
    return subject, build_arm(copy.deepcopy(base), subject, row.workload, pristine=base)


def ready_row(row: Row, subject: Subject | None, arm: Arm) -> tuple[Step, Proof | None]:
    """The row's step, run once, on an arm that has just been proven right."""
    training = row.workload.phase == "train"
    proof = prove_training(arm, subject) if training and subject is not None else None
    step = make_step(arm, row.workload)
    if subject is not None and not training:
        return step, prove(arm, step)
    # At its full size: a step that fails costs its own row here, and the whole comparison once all take turns.
    step.prepare()
    step.run()
    return step, proof


def time_interleaved(steps: dict[Row, Step], device: str, budget_seconds: float) -> dict[Row, list[float]]:
    """Seconds of every step, one of each in each round, in seeded random order within the round.

    On a CPU every other round finds the weights at other places in memory. There are at least 10 rounds, and then more
    until `budget_seconds` are over or 200 rounds are done.
    """
    clock, order = clock_of(device), random.Random(0)
    seconds: dict[Row, list[float]] = {row: [] for row in steps}
    gc.collect()
    started = time.monotonic()
    for turn in range(-WARM_UP_ROUNDS, MOST_ROUNDS):
        if turn >= LEAST_ROUNDS and time.monotonic() - started > budget_seconds:
            break
        if turn % ROUNDS_IN_PLACE == 0 and not device.startswith("cuda"):
            for row in order.sample(list(steps), len(steps)):
                steps[row].relocate()
        for row in order.sample(list(steps), len(steps)):
            steps[row].prepare()
            taken = clock(steps[row].run)
            if turn >= 0:
                seconds[row].append(taken)
    return seconds


def weigh(rows: Sequence[Row], device: str) -> Iterator[tuple[Row, dict[str, Any]]]:
    """The peak memory of one arm, phase by phase: run it in a process that does nothing else."""
    settle_threads(device)
    subject = None if rows[0].subject == BASE else subjects.find(rows[0].subject)
    arm = build_arm(build_base(rows[0], device), subject, rows[0].workload)
    gc.collect()
    for row in rows:
        step = make_step(arm, row.workload)
        yield row, peak_memory(arm, step, device, train=row.workload.phase == "train")
