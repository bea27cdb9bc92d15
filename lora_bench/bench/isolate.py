"""A function in a process of its own: its crash or hang costs one result, and its peaks are its own."""

from __future__ import annotations

import gc
import multiprocessing
import re
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from ctypes import Array, c_longlong
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

PRELOAD = ["lora_bench.bench.preload"]
NOTHING = -1
LAST_SECONDS = 5.0
"""How long a worker may take to end once it has said all."""
NO_MEMORY = re.compile(
    "CUDA error: (out of memory|CUBLAS_STATUS_ALLOC_FAILED)|DefaultCPUAllocator: (can't allocate|not enough) memory"
)
"""How torch says so in a RuntimeError: of the CUDA runtime, of cuBLAS when it starts late, and of a CPU."""
LOST = re.compile("CUDA error: (no CUDA-capable device is detected|uncorrectable ECC error encountered)")
"""How the CUDA runtime says that a device which it has used is gone, or that nothing computed on it can be trusted."""
OOM_KILLS = (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat"))


_held: Array[c_longlong] | None = None
"""In a worker: what it has in hand, and how often that changed; shared with whoever listens."""


class Failure(NamedTuple):
    """What a worker ended with instead of its result; `held` is what it had in hand, if it told.

    kind: "oom", "crashed", "timeout", "gpu_lost" or "error".
    """

    kind: str
    text: str
    detail: str = ""
    held: int | None = None


def stream(function: Callable[..., Iterator[Any]], *arguments: Any, seconds: float = 0) -> Iterator[Any]:
    """What the generator `function(*arguments)` yields in a fresh process, as it comes; a `Failure` last if it failed.

    Where it neither yields nor calls `hold` for so many `seconds` it is killed (0: never). Everything must pickle. The
    process is forked from a server that has imported torch but never used it, so that it starts in milliseconds and
    holds no other scenario's memory.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    held = context.RawArray("q", [NOTHING, 0])
    kills = oom_kills()
    worker = context.Process(target=_serve, args=(sender, held, function, arguments, sys.path), daemon=True)
    worker.start()
    sender.close()

    def failure(kind: str, text: str, detail: str = "") -> Failure:
        return Failure(kind, text, detail, None if held[0] == NOTHING else held[0])

    patience = 0.0
    try:
        while True:
            if not _answers(receiver, held, seconds):
                yield failure("timeout", f"nothing came for {seconds:g} s")
                return
            try:
                kind, value = receiver.recv()
            except (EOFError, OSError):  # the latter in the middle of a message
                _end(worker, LAST_SECONDS)
                out_of_memory = worker.exitcode == -signal.SIGKILL and oom_kills() > kills
                yield failure("oom" if out_of_memory else "crashed", _death(worker.exitcode))
                return
            if kind == "value":
                yield value
                continue
            patience = LAST_SECONDS
            if kind == "failure":
                yield failure(*value)
            return
    finally:
        receiver.close()
        _end(worker, patience)


def _answers(receiver: Connection, held: Array[c_longlong], seconds: float) -> bool:
    """Wait for an answer; False where none comes and nothing new is taken in hand in that time."""
    if not seconds:
        return True
    changes, since = held[1], time.monotonic()
    while not receiver.poll(min(seconds / 4, 1.0)):
        if held[1] != changes:
            changes, since = held[1], time.monotonic()
        elif time.monotonic() - since >= seconds:
            return False
    return True


def _end(worker: BaseProcess, patience: float) -> None:
    worker.join(timeout=patience)
    if worker.is_alive():
        worker.kill()
        worker.join()


def _serve(
    sender: Connection,
    held: Array[c_longlong],
    function: Callable[..., Iterator[Any]],
    arguments: tuple[Any, ...],
    path: list[str],
) -> None:
    global _held  # of this process, and set once
    sys.path[:], _held = path, held
    gc.freeze()  # what torch has imported is no garbage: to look through it takes a quarter of a second each time
    try:
        for value in function(*arguments):
            sender.send(("value", value))
        sender.send(("end", None))
    except Exception as error:  # noqa: BLE001  # whatever it is, the parent reports it as this row's failure
        sender.send(("failure", (failure_kind(error), f"{type(error).__name__}: {error}", traceback.format_exc())))
    finally:
        sender.close()


def hold(number: int) -> None:
    """Tell whoever listens what is in hand now, by a number; outside of a worker nobody does."""
    if _held is not None:
        _held[0] = number
        _held[1] += 1


def failure_kind(error: BaseException) -> str:
    """What an exception means for a run: "oom", "gpu_lost", or any other "error".

    Other CUDA errors may as well be a kernel's own fault: whether the device is there is then NVML's to say.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or NO_MEMORY.search(str(error)):
        return "oom"
    return "gpu_lost" if type(error).__name__ == "GpuLost" or LOST.search(str(error)) else "error"


def oom_kills() -> int:
    """How many processes the kernel has killed for memory, here or in this container; 0 where it does not tell."""
    for path in OOM_KILLS:
        try:
            counted = dict(line.split() for line in path.read_text().splitlines())
        except (OSError, ValueError):
            continue
        if "oom_kill" in counted:
            return int(counted["oom_kill"])
    return 0


def _death(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        return f"the worker was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"the worker exited with {exitcode} before its result"
