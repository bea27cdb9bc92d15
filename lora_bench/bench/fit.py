"""The largest batch, sequence or number of adapters that fits in memory, found by trying, each in its own process.

On a CPU the resident peak is what counts, and it is more than the tensors: glibc's malloc leaves gaps between them,
which grow with them (the variable MALLOC_MMAP_THRESHOLD_=65536 closes most), and libraries load code when it is used.
"""

from __future__ import annotations

import os
import resource
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_bench.bench import measure
from lora_bench.bench.budget import Budget, budget
from lora_bench.bench.isolate import Failure, stream
from lora_bench.bench.workload import BASE, Row, Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SETUPS = {"lora": "separate", "qlora": "four_bit", "full": BASE}
"""The set-up that each mode is measured in; more adapters than one share a batch."""
QUANTITIES = {"batch": 1, "sequence": 2, "adapters": 1}
"""What may be looked for, and the least of it."""
COARSENESS = 32
"""The bisection ends within 1 / 32 of what fits: a peak on a CPU is not known better."""


class Trial(NamedTuple):
    """One size that was tried.

    peak_bytes: of the process, or None where memory ran out; context_bytes: what of it the model has no part in, Python
    and torch on a CPU, the driver on a GPU (0 where nobody tells); estimated_bytes: the budget's peak and the context.
    """

    size: int
    fits: bool
    peak_bytes: int | None
    context_bytes: int
    estimated_bytes: int


class Broken(Exception):
    """A trial that failed otherwise than for want of memory; its text says how."""


def row_of(mode: str, subject: str, phase: str, adapters: int, **place: Any) -> Row:
    """The row that measures `mode`; ValueError for one that is not measured and for values out of range."""
    if mode not in SETUPS:
        raise ValueError(f"the mode must be one of {', '.join(SETUPS)}, got {mode!r}")
    setup = SETUPS[mode] if adapters == 1 else "batched"
    if setup == "batched" and (mode != "lora" or phase == "train"):
        raise ValueError(f"several adapters share a batch in mode lora, to infer; got {mode} and {phase}")
    row = Row(subject, Workload(setup, phase, adapters=adapters, **place))
    return row.base() if mode == "full" else row


def search(attempt: Callable[[int], Trial], least: int) -> Iterator[Trial]:
    """The trials as they are made: `least` and its doubles until one does not fit, then bisection.

    What fits is taken to fit at every smaller size too. It ends within 1 / 32 of the largest that fits.
    """
    fitting, size = 0, least
    while True:
        trial = attempt(size)
        yield trial
        if not trial.fits:
            break
        fitting, size = size, 2 * size
    failing = size
    while fitting and failing - fitting > max(1, fitting // COARSENESS):
        trial = attempt((fitting + failing) // 2)
        yield trial
        if trial.fits:
            fitting = trial.size
        else:
            failing = trial.size


def attempt(size: int, row: Row, mode: str, *, device: str, limit: int | None) -> Trial:
    """Run the row in a process of its own, and see whether it stays within `limit` bytes; `size` is what it stands for.

    None is the limit that the device itself sets. On a CPU the process is given no more memory than is free, so that
    the machine never swaps.

    Raises Broken for any other failure, and where the peak is not told.
    """
    estimated = estimate(row, mode, device).peak
    room = None if device == "cuda" else measure.free_bytes(device)
    context, peak = 0, None
    for message in stream(weigh_within, row, device, room):
        match message:
            case Failure():
                if not out_of_memory(message):
                    raise Broken(f"at {size}, {message.text}")
            case int():
                context = message
            case (_, memory):
                peak, beside = _peak(memory, device)
                context += beside
    fits = peak is not None and (limit is None or peak <= limit)
    return Trial(size, fits, peak, context, estimated + context)


def estimate(row: Row, mode: str, device: str) -> Budget:
    """What the row would take; ValueError for a model whose shapes are not known."""
    workload = row.workload.as_dict()
    chosen = {name: workload[name] for name in ("model", "batch", "sequence", "dtype", "phase", "adapters")}
    return budget(**chosen, mode=mode, rank=max(1, row.workload.rank), device=device)


def weigh_within(row: Row, device: str, room: int | None) -> Iterator[Any]:
    """In a process of its own: what it has before anything is built (on a CPU), then what `measure.weigh` yields.

    With `room` the process may map that many bytes more than it has, and is refused the rest.
    """
    if room is not None:
        import psutil

        here = psutil.Process(os.getpid()).memory_info()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (here.vms + room, hard))
        yield here.rss
    yield from measure.weigh([row], device)


def out_of_memory(failure: Failure) -> bool:
    """Whether a worker ended for want of memory; torch's CPU allocator raises a plain RuntimeError."""
    return failure.kind == "oom" or "can't allocate memory" in failure.text


def _peak(memory: dict[str, Any], device: str) -> tuple[int, int]:
    """The process's peak, and what of it torch does not know of; on a GPU, where NVML does not tell, torch's own."""
    if device == "cuda":
        whole, torchs = memory["nvml_process_bytes"], memory["reserved_peak_bytes"]
        return (whole, whole - torchs) if isinstance(whole, int) else (torchs, 0)
    peak = memory["resident_peak_bytes"]
    if not isinstance(peak, int):
        raise Broken(f"the resident peak is {peak}")
    return peak, 0
