"""How long one step takes on a device, in seconds."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

Moment: TypeAlias = "int | torch.cuda.Event"


def wall_clock(step: Callable[[], object]) -> float:
    """Seconds of one call on the CPU, by the monotonic clock."""
    start = time.perf_counter_ns()
    step()
    return (time.perf_counter_ns() - start) / 1e9


def event_clock(step: Callable[[], object], device: str = "cuda") -> float:
    """Seconds on a CUDA device from idle to the end of the call's last kernel, by device events.

    It starts on an idle device, so that no neighbour's queue is counted; time in which the device waits for the CPU
    to launch is inside, since a user waits for it too.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record(torch.cuda.current_stream(device))
    step()
    end.record(torch.cuda.current_stream(device))
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def moment(device: str) -> Moment:
    """A moment within a timed call; on CUDA an event of the current stream, which waits for nothing.

    On a device that was idle before, time in which it waits for the CPU lies between such moments as well.
    """
    return event_now(device) if device.startswith("cuda") else time.perf_counter_ns()


def event_now(device: str) -> torch.cuda.Event:
    """An event that a CUDA device reaches when it has done all that is in the queue of its current stream."""
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(start: Moment, end: Moment) -> float:
    """From one moment to the other, in seconds; waits for the device to reach the latter."""
    if isinstance(start, int) and isinstance(end, int):
        return (end - start) / 1e9
    assert not isinstance(start, int)
    assert not isinstance(end, int)
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def clock_of(device: str) -> Callable[[Callable[[], object]], float]:
    """The clock of a device ("cpu", "cuda", "cuda:1")."""
    return partial(event_clock, device=device) if device.startswith("cuda") else wall_clock
