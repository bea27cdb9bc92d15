"""The jobs of a worker: time a comparison's rows side by side; take one arm's peak memory, or its energy."""

from __future__ import annotations

import copy
import gc
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lora_bench import subjects
from lora_bench.bench import launches
from lora_bench.bench.arm import build_arm, make_step, torch_dtype
from lora_bench.bench.ceilings import measure_ceilings
from lora_bench.bench.clock import clock_of
from lora_bench.bench.clocks import Window
from lora_bench.bench.energy import measure_energy
from lora_bench.bench.isolate import failure_kind, hold
from lora_bench.bench.machine import fingerprint
from lora_bench.bench.memory import device_used_bytes, parameter_bytes, peak_memory
from lora_bench.bench.meter import meter_of
from lora_bench.bench.nvml import Unavailable
from lora_bench.bench.proof import Wrong, prove, prove_switched, prove_training, summary
from lora_bench.bench.sampling import Samples, interleave
from lora_bench.bench.workload import BASE
from lora_bench.models.build import build as build_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedModel

    from lora_bench.bench.arm import Arm, Step
    from lora_bench.bench.counts import Ceilings
    from lora_bench.bench.result import Proof
    from lora_bench.bench.workload import Row
    from lora_bench.subject import Subject


class Progress(NamedTuple):
    """A line for whoever waits."""

    text: str


class Timing(NamedTuple):
    """One row's samples, and the base's of the same rounds; `beside`: all that took turns.

    `window` is what happened to the device's clocks meanwhile, as `Window.as_dict` tells it; `parts` holds the seconds
    of each part of a step that has parts, sample by sample.
    """

    row: Row
    samples: Samples
    base: Samples
    proof: Proof | None
    beside: list[str]
    window: dict[str, Any]
    parts: dict[str, list[float]] = {}  # noqa: RUF012  # of a tuple, and never changed


class Launches(NamedTuple):
    """What a GPU told of one row beside its samples, as in `lora_bench.bench.launches.look`."""

    row: Row
    found: dict[str, Any]


class Refusal(NamedTuple):
    """A row that was not timed, and why: the build or the proof failed ("error", "wrong", "oom")."""

    row: Row
    kind: str
    text: str


def compare(
    rows: Sequence[Row], device: str, budget_seconds: float
) -> Iterator[Progress | Timing | Launches | Refusal | Ceilings | dict[str, Any]]:
    """Time `rows` (each phase's base among them) interleaved; yields fingerprint, ceilings, then each row's result.

    Every arm is built and proven first; rows whose arm fails are refused and the rest goes on. In each round every
    row of a phase runs once, in random order, so that what disturbs the machine disturbs all of them. On a GPU each row
    is then looked at with cold caches, and without its launches. Arms that do not fit the memory together are compared
    in groups, each with its own run of the base.
    """
    settle_threads(device)
    yield fingerprint(device)
    yield measure_ceilings(device, torch_dtype(rows[0].workload.dtype))
    base = build_base(rows[0], device)
    numbers = {row: number for number, row in enumerate(rows)}
    for number, group in enumerate(groups_that_fit(rows, parameter_bytes(base), free_bytes(device))):
        if number and group[0].workload.phase == "train":
            base = build_base(group[0], device)  # the group before has trained the other
        yield from _compare_group(group, base, device, budget_seconds, lambda row: hold(numbers[row]))
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
        chosen = arms[start : start + per_group]
        groups.append([row for row in rows if row.subject == BASE or row.arm in chosen])
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
    rows: Sequence[Row],
    base: PreTrainedModel,
    device: str,
    budget_seconds: float,
    holding: Callable[[Row], None],
) -> Iterator[Progress | Timing | Launches | Refusal]:
    steps: dict[Row, Step] = {}
    proofs: dict[Row, Proof | None] = {}
    for arm_rows in _by_arm(rows):
        holding(arm_rows[0])
        refused = []
        try:
            ready = _ready(base, arm_rows)
        except Exception as error:  # a subject may raise anything; its rows are refused by name
            if (kind := refusal_kind(error)) == "gpu_lost":
                raise
            refused = [Refusal(row, kind, told(error, device)) for row in arm_rows]
        if refused:
            _release(device)  # first: where it finds the device out of order, that is no row's fault
            yield from refused
            continue
        for row, (step, proof) in zip(arm_rows, ready, strict=True):
            steps[row], proofs[row] = step, proof
        if shown := [proof for row in arm_rows if (proof := proofs[row]) is not None]:
            checks, error_ratio, _ = summary(shown)
            name = arm_rows[0].arm_name
            yield Progress(f"{name} is right: {checks} checks, errors up to {error_ratio:.2f} of their bounds")
    yield from _take_turns(steps, proofs, device, budget_seconds, holding)


def _take_turns(
    steps: dict[Row, Step],
    proofs: dict[Row, Proof | None],
    device: str,
    budget_seconds: float,
    holding: Callable[[Row], None],
) -> Iterator[Progress | Timing | Launches]:
    """Time the rows of each phase beside each other, and look at all of them once more on a GPU."""
    hot: dict[Row, list[float]] = {}
    for phase in dict.fromkeys(row.workload.phase for row in steps):
        of_phase = [row for row in steps if row.workload.phase == phase]
        controls = {row.base() for row in of_phase}
        chosen = {row: step for row, step in steps.items() if row in of_phase or row in controls}
        yield Progress(f"timing {phase}: {len(chosen)} rows taking turns, about {budget_seconds:.0f} s")
        with Window(device) as window:
            samples = interleave(
                chosen,
                clock_of(device),
                budget_seconds=budget_seconds,
                relocating=not device.startswith("cuda"),
                holding=holding,
            )
        control = next((samples[row] for row in samples if row.subject == BASE), Samples([], [], []))
        for row in samples:
            beside = [str(other) for other in samples]
            parts = steps[row].parts(len(samples[row].seconds))
            yield Timing(row, samples[row], control, proofs[row], beside, window.as_dict(), parts)
            hot[row] = samples[row].seconds
    if device.startswith("cuda") and hot:  # last: what goes wrong here costs no row its times
        yield Progress(f"{len(hot)} rows with cold caches, and without their launches")
        found = launches.look(steps, hot, device, budget_seconds=budget_seconds, holding=holding)
        yield from (Launches(*each) for each in found)


def refusal_kind(error: Exception) -> str:
    """Tell "wrong" (it does not compute LoRA) from what `failure_kind` tells apart."""
    return "wrong" if isinstance(error, Wrong) else failure_kind(error)


def told(error: Exception, device: str) -> str:
    """An exception's type and text, and where the memory ran out, the peak that it had reached."""
    text = f"{type(error).__name__}: {error}"
    if failure_kind(error) == "oom" and device.startswith("cuda"):
        text += f" (peak reached: {torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB)"
    return text


def _ready(base: PreTrainedModel, rows: Sequence[Row]) -> list[tuple[Step, Proof | None]]:
    built = build(base, rows[0])
    return [ready_row(row, *built) for row in rows]


def _release(device: str) -> None:
    """Give back what is not used; raises where the device is out of order, which no other row in here survives."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.synchronize(device)


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
    if row.workload.phase == "switch":
        return step, prove_switched(arm, row.workload)
    if subject is not None and not training:
        return step, prove(arm, step)
    # At its full size: a step that fails costs its own row here, and the whole comparison once all take turns.
    step.prepare()
    step.run()
    return step, proof


def weigh(rows: Sequence[Row], device: str) -> Iterator[tuple[Row, dict[str, Any]] | dict[str, Any]]:
    """The fingerprint, and the peak memory of one arm, phase by phase: run it in a process that does nothing else."""
    settle_threads(device)
    yield fingerprint(device)
    used_before = device_used_bytes(device)
    arm = _alone(rows, device)
    for number, row in enumerate(rows):
        hold(number)
        step = make_step(arm, row.workload)
        train = row.workload.phase == "train"
        yield row, peak_memory(arm, step, device, train=train, used_before=used_before)


def power(rows: Sequence[Row], device: str, seconds: float) -> Iterator[tuple[Row, dict[str, Any]] | dict[str, Any]]:
    """The fingerprint, and the energy of one arm, phase by phase, each in a window of so many seconds."""
    settle_threads(device)
    yield fingerprint(device)
    meter = meter_of(device)
    if isinstance(meter, Unavailable):
        yield from ((row, {"energy": str(meter)}) for row in rows)
        return
    arm = _alone(rows, device)
    for number, row in enumerate(rows):
        hold(number)
        step = make_step(arm, row.workload)

        def once(step: Step = step, number: int = number) -> None:
            hold(number)
            step.prepare()
            step.run()

        found = measure_energy(once, device=device, tokens=row.workload.tokens, seconds=seconds, meter=meter)
        yield row, {"energy": str(found)} if isinstance(found, Unavailable) else found.as_dict()


def _alone(rows: Sequence[Row], device: str) -> Arm:
    """The arm of these rows, with nothing beside it to judge it by."""
    subject = None if rows[0].subject == BASE else subjects.find(rows[0].subject)
    arm = build_arm(build_base(rows[0], device), subject, rows[0].workload)
    gc.collect()
    return arm
