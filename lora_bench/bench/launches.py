"""On a GPU, beside the samples that take turns: cold ones, those of a CUDA graph, and how much of a step is launching.

Device time is what the device needs once nobody makes it wait. A graph that is replayed needs one launch for the whole
step, so its time is the device's; but only decoding is captured, and not what copies from the host or waits for the
device. Of the rest it is taken by events around a step that was put into the queue whole while the device was still
busy with something else. A queue holds about a thousand launches, and a step that waits for the device empties it: of
such a step that is too much, and the share of launching too little, never too much.
"""

from __future__ import annotations

import statistics
import warnings
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_bench.bench.clock import event_clock, event_now, seconds_between
from lora_bench.bench.isolate import failure_kind
from lora_bench.bench.nvml import Unavailable
from lora_bench.bench.sampling import interleave

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from lora_bench.bench.arm import Step
    from lora_bench.bench.workload import Row

ROUNDS, WARM_UP = 10, 3
COLD_PART = 10
"""Cold samples get one such part of the time that hot ones have."""
CYCLES, LONGEST = 2e9, 1.0
"""Cycles a second of the fastest of today's GPUs, and the seconds for which one is kept busy at most."""
CLOSE = 0.01
"""How far a replay's output may be from the step's own, as a share of the largest: kernels may add in any order."""


def look(
    steps: Mapping[Row, Step],
    hot: Mapping[Row, Sequence[float]],
    device: str,
    *,
    budget_seconds: float,
    holding: Callable[[Row], None],
) -> Iterator[tuple[Row, dict[str, Any]]]:
    """What there is to know of each row besides its `hot` seconds; the steps have warmed up.

    cold_seconds: samples that take turns as the hot ones do, before each of which more than the L2 cache was written.
    graph_seconds: replays of a CUDA graph, for decoding. device_seconds: the step without waiting for launches, as the
    module tells. launch_share: (hot - device) / hot of the medians, 0 at least. Where there are none it is a text with
    the reason.
    """
    with torch.cuda.device(device):
        cold = cold_seconds(steps, device, budget_seconds=budget_seconds / COLD_PART, holding=holding)
        for row, step in steps.items():
            holding(row)
            decodes = row.workload.phase == "decode"
            graph = graph_seconds(step, device) if decodes else Unavailable("only decoding is captured")
            wall = statistics.median(hot[row])
            own = queued_seconds(step, device, 2 * wall) if isinstance(graph, Unavailable) else graph
            yield (
                row,
                {
                    "cold_seconds": str(cold) if isinstance(cold, Unavailable) else cold[row],
                    "graph_seconds": str(graph) if isinstance(graph, Unavailable) else graph,
                    "device_seconds": own,
                    "launch_share": max(0.0, 1 - statistics.median(own) / wall),
                },
            )


def cold_seconds(
    steps: Mapping[Row, Step], device: str, *, budget_seconds: float, holding: Callable[[Row], None]
) -> dict[Row, list[float]] | Unavailable:
    """Samples before each of which twice the L2 cache's size was written: nothing of the step's is left in it."""
    size = 2 * int(torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        buffer = torch.empty(size, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        return Unavailable(f"there is no room for the {size:,} bytes that empty the L2 cache")

    def clock(run: Callable[[], object]) -> float:
        buffer.zero_()
        return event_clock(run, device)

    taken = interleave(steps, clock, budget_seconds=budget_seconds, relocating=False, holding=holding, steady=False)
    return {row: samples.seconds for row, samples in taken.items()}


def graph_seconds(step: Step, device: str) -> list[float] | Unavailable:
    """Replays of the step as a CUDA graph, once it has been seen that a replay computes what the step does.

    It warms up on a stream of its own, on which it is captured as well: what libraries set up at the first call must
    not become a part of the graph. Its last warm-up is a rehearsal in which torch refuses to wait for the device, since
    a capture that is broken off by that leaves torch's allocator in the middle of it (until torch 2.12).

    What cannot be captured is unavailable; raises where the device, or torch, is out of order.
    """
    stream = torch.cuda.Stream(device)
    graph = torch.cuda.CUDAGraph()
    try:
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for left in reversed(range(WARM_UP)):
                step.prepare()
                with nullcontext() if left else waiting_refused():
                    wanted = output_of(step.run())
            wanted = wanted.clone()
        torch.cuda.current_stream(device).wait_stream(stream)
        step.prepare()
        read = step.reads()  # it must stay where it is until the last replay
        with torch.cuda.stream(stream), unnoticed(), torch.cuda.graph(graph, stream=stream):
            output = output_of(step.run())
    except Exception as error:  # a subject may raise anything, and so may a capture
        if failure_kind(error) == "gpu_lost":
            raise
        torch.cuda.synchronize(device)  # raises where no other row could be measured either
        torch.cuda.empty_cache()  # so does this, where a capture has not ended
        return Unavailable(f"it cannot be captured: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    with torch.inference_mode():
        output.zero_()
        graph.replay()
        torch.cuda.synchronize(device)
        if not float((output - wanted).abs().max()) <= CLOSE * float(wanted.abs().max()):  # nor is NaN close
            return Unavailable("a replay does not compute what the step does")
    taken = [event_clock(graph.replay, device) for _ in range(ROUNDS)]
    del read
    return taken


@contextmanager
def waiting_refused() -> Iterator[None]:
    """Inside, torch raises RuntimeError for an operation in which the host waits for the device."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it does not know every such operation
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def unnoticed() -> Iterator[None]:
    """Inside, torch says that nothing is captured, so that what is captured is what was timed.

    transformers 5.17, for one, asks, and in a capture builds a mask that it otherwise leaves out, with which torch
    attends by another kernel.
    """
    asked = torch.cuda.is_current_stream_capturing
    torch.cuda.is_current_stream_capturing = lambda: False
    try:
        yield
    finally:
        torch.cuda.is_current_stream_capturing = asked


def output_of(found: object) -> Tensor:
    """The tensor that a step gives: itself, or a language model's logits. Raises TypeError where there is none."""
    output = getattr(found, "logits", found)
    if not isinstance(output, Tensor):
        raise TypeError(f"a step is compared by the tensor that it gives, and this one gives {type(found).__name__}")
    return output


def queued_seconds(step: Step, device: str, busy_seconds: float) -> list[float]:
    """By events, of steps that were put into the queue while the device was kept busy for so many seconds, or one."""
    cycles, taken = int(min(busy_seconds, LONGEST) * CYCLES), []
    for _ in range(ROUNDS):
        step.prepare()
        torch.cuda.synchronize(device)
        torch.cuda._sleep(cycles)  # noqa: SLF001  # there is no other kernel that takes as long as it is told
        start = event_now(device)
        step.run()
        taken.append(seconds_between(start, event_now(device)))
    return taken
