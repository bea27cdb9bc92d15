"""The jobs of a worker: time a comparison's rows side by side; take one arm's peak memory, or its energy."""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING, Any

import torch

from lora_bench.bench.arm import make_step, torch_dtype
from lora_bench.bench.brackets import bracketed
from lora_bench.bench.ceilings import measure_ceilings
from lora_bench.bench.energy import measure_energy
from lora_bench.bench.groups import grouped
from lora_bench.bench.isolate import hold
from lora_bench.bench.machine import fingerprint
from lora_bench.bench.memory import device_used_bytes, parameter_bytes, peak_memory
from lora_bench.bench.meter import meter_of
from lora_bench.bench.nvml import Unavailable
from lora_bench.bench.ready import build_alone, build_base, release
from lora_bench.bench.turns import Progress, Refusal, take_turns

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lora_bench.bench.arm import Arm, Step
    from lora_bench.bench.counts import Ceilings
    from lora_bench.bench.turns import Message
    from lora_bench.bench.workload import Row


def compare(rows: Sequence[Row], device: str, budget_seconds: float) -> Iterator[Message | Ceilings | dict[str, Any]]:
    """Time `rows` (each phase's base among them) interleaved; yields fingerprint, ceilings, then each row's result.

    Every arm is built and proven first; rows whose arm fails are refused and the rest goes on. In each round every
    row of a phase runs once, in random order, so that what disturbs the machine disturbs all of them. On a GPU each row
    is then looked at with cold caches, and without its launches. Arms that do not fit the memory together are compared
    in groups, each with its own run of the base; one that does not fit beside the base is timed between two runs of it.
    """
    settle_threads(device)
    yield fingerprint(device)
    yield measure_ceilings(device, torch_dtype(rows[0].workload.dtype))
    release(device)
    base = build_base(rows[0], device)
    numbers = {row: number for number, row in enumerate(rows)}

    def holding(row: Row) -> None:
        hold(numbers[row])

    weights, on_gpu = parameter_bytes(base), device.startswith("cuda")
    # On a CPU what waits in the host's memory takes room as well: there an arm that is too large is tried by itself.
    groups, too_large = grouped(rows, weights, free_bytes(device), apart=on_gpu)
    for number, group in enumerate(groups):
        if number and group[0].workload.phase == "train":
            del base  # which the group before has trained
            release(device)
            base = build_base(group[0], device)
        yield from take_turns(group, base, device, budget_seconds, holding)
        release(device)
    if too_large and weights > (free := free_bytes("cpu")):
        why = f"no room beside the base, and its {weights:,} bytes do not fit the host's memory: {free:,} are free"
        yield from (Refusal(row, "oom", why) for row in too_large)
    elif too_large:
        yield Progress(f"{len(too_large)} rows have no room beside the base: each is timed between two runs of it")
        del base
        release(device)
        host = build_base(rows[0], device).to("cpu")
        release(device)
        bases = dict.fromkeys(row.base() for row in too_large)
        yield from bracketed([*bases, *too_large], host, device, budget_seconds, holding)


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
    _, arm = build_alone(rows[0], device)
    gc.collect()
    return arm
